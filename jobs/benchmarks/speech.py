"""Speech to measure with: stretches of the bundled prompts as clips, as files, as one long recording or as a corpus."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import soundfile

from graft.audio.clip import SAMPLE_RATE, AudioClip, encode_flac, read_audio, resample
from graft.data.dataset import clip_row, write_corpus
from graft.errors import AudioError, DataError
from graft.text.wer import score

from ..preparation.clips import row_audio
from ..preparation.manifests import DroppedLine, read_manifests
from ..preparation.recipe import Manifest

PROMPTS = Path(__file__).parents[1] / "data" / "prompts"
MANIFESTS = tuple(str(PROMPTS / name) for name in ("train.jsonl", "unseen.jsonl"))
WORDS = ["the", "of", "and", "to", "that", "is", "was", "he", "for", "with", "as", "his", "on", "be", "at", "by", "had"]
WORDS_PER_S = 2.5
SHORTEST_S, LONGEST_S, MEAN_S = 2.0, 20.0, 10.0
# The number of files in an archive, or of clips in a corpus, that differ.
DISTINCT = 100
TELEPHONE_RATE, LONGEST_LABELLED_S = 8_000, 30.0

# A clip and the words that are said in it.
LabelledClip = tuple[AudioClip, str]


def labelled_speech(manifests: Sequence[str] | None) -> list[LabelledClip]:
    """Read the clips of manifests, by default the bundled prompts. Raises DataError, AudioError, MissingExtra."""
    score(["a"], ["a"])  # packages that are missing for scoring are reported now, not after the transcription
    clips = []
    for row in read_manifests([Manifest(manifest=path) for path in manifests or MANIFESTS]):
        if isinstance(row, DroppedLine):
            raise DataError(f"{row.source}: line {row.line}: {row.reason}: correct the line or remove it")
        clip = read_audio(row_audio(row)[0], name=str(row.audio))
        if clip.duration_s > LONGEST_LABELLED_S:
            limit = f"not every peer takes more than {LONGEST_LABELLED_S:g} s at a time: remove the clip"
            raise AudioError(f"{row.audio}: {clip.duration_s:.1f} s: {limit}")
        clips.append((clip, row.text))
    return clips


def durations(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the seconds of clips, 2 to 20 with a mean of 10: evenly spaced quantiles of a log-normal, shuffled."""
    spread = np.exp([0.45 * NormalDist().inv_cdf((number + 0.5) / count) for number in range(count)])
    factor = MEAN_S
    for _ in range(20):  # clipping moves the mean
        factor *= MEAN_S / np.clip(factor * spread, SHORTEST_S, LONGEST_S).mean()
    return rng.permutation(np.clip(factor * spread, SHORTEST_S, LONGEST_S))


def spoken_clips(count: int, *, seconds: float | None = None) -> Iterator[LabelledClip]:
    """Yield always the same clips of `seconds`, by default of 2 to 20 s, with as many random words as would be said."""
    rng, speech = np.random.default_rng(0), _all_prompts()
    for duration_s in np.full(count, seconds) if seconds else durations(count, rng):
        places = np.arange(int(duration_s * SAMPLE_RATE)) + rng.integers(len(speech))
        text = " ".join(rng.choice(WORDS, size=round(duration_s * WORDS_PER_S)))
        yield AudioClip(speech.take(places, mode="wrap")), text


def write_archive(folder: Path, count: int, *, seconds: float | None = None) -> list[Path]:
    """Write FLAC files of `seconds` each or of 2 to 20 s; returns those that differ, to which the others are links."""
    folder.mkdir(parents=True)
    files = [folder / f"{number:07}.flac" for number in range(min(count, DISTINCT))]
    for file, (clip, _) in zip(files, spoken_clips(len(files), seconds=seconds), strict=True):
        file.write_bytes(encode_flac(clip))
    link_files(folder, files, range(len(files), count))
    return files


def link_files(folder: Path, files: Sequence[Path], numbers: Iterable[int]) -> None:
    """Write a link to one of the files for each number, a thousand to a folder."""
    for number in numbers:
        home = folder / f"{number // 1000:05}"
        home.mkdir(exist_ok=True)
        os.link(files[number % len(files)], home / f"{number:07}{files[0].suffix}")


def write_long_recording(path: Path, hours: float) -> None:
    """Write a telephone recording: 8 kHz, one byte for a sample."""
    speech = np.concatenate(list(resample([_all_prompts()], SAMPLE_RATE, TELEPHONE_RATE)))
    remaining = round(hours * 3600 * TELEPHONE_RATE)
    with soundfile.SoundFile(path, "w", TELEPHONE_RATE, 1, subtype="ULAW", format="WAV") as file:
        while remaining > 0:
            file.write(speech[:remaining])
            remaining -= len(speech)


def write_speech_corpus(path: Path, count: int) -> str:
    """Write a corpus of FLAC clips in row groups of 100; returns its path."""
    rows = [clip_row("made", clip, text) for clip, text in spoken_clips(min(count, DISTINCT))]
    write_corpus((rows[number % len(rows)] | {"ID": str(number)} for number in range(count)), path)
    return str(path)


def _all_prompts() -> np.ndarray:
    """Read all prompts, one after the other."""
    return np.concatenate([read_audio(path).samples for path in sorted((PROMPTS / "audio").glob("*.flac"))])
