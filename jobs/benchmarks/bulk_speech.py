"""What the benchmarks of bulk transcription hear: stretches of the bundled prompts, tiled, as archives of many files or one long one."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from graft.audio.clip import SAMPLE_RATE, AudioClip, read_audio, resample
from graft.errors import AudioError, DataError

from ..preparation.manifests import Dropped, Manifest, clip_of, read_manifests
from .speech import durations

PROMPTS = Path(__file__).parents[1] / "data" / "prompts"
MANIFESTS = tuple(str(PROMPTS / name) for name in ("train.jsonl", "unseen.jsonl"))
DISTINCT = 100
"""Files of an archive that differ; the others are links to these."""
TELEPHONE_RATE = 8_000
MOST_S = 30.0


@dataclass(frozen=True)
class Labelled:
    """A clip and what is said in it."""

    clip: AudioClip
    text: str


def labelled_speech(manifests: Sequence[str]) -> list[Labelled]:
    """Read the clips of manifests. Raises DataError for lines that can't be used and for clips over 30 s, AudioError."""
    found = []
    for row in read_manifests([Manifest(manifest=path) for path in manifests]):
        if isinstance(row, Dropped):
            raise DataError(f"{row.source}: line {row.line}: {row.reason}: correct it or take it out")
        clip = read_audio(clip_of(row), name=str(row.audio))
        if clip.duration_s > MOST_S:
            raise AudioError(
                f"{row.audio}: {clip.duration_s:.1f} s: not every peer hears more than {MOST_S:g} s at a time: take it out"
            )
        found.append(Labelled(clip, row.text))
    return found


def write_archive(folder: Path, count: int, *, seconds: float | None = None) -> list[Path]:
    """Write so many FLAC files of `seconds` each, or of 2 to 20 s and 10 on average; returns those that differ."""
    rng = np.random.default_rng(0)
    speech = _spoken()
    distinct = min(count, DISTINCT)
    lengths = np.full(distinct, seconds) if seconds else durations(distinct, rng)
    folder.mkdir(parents=True)
    written = [folder / f"{number:07}.flac" for number in range(distinct)]
    for path, length_s in zip(written, lengths, strict=True):
        soundfile.write(path, np.roll(speech, -rng.integers(len(speech)))[: int(length_s * SAMPLE_RATE)], SAMPLE_RATE)
    link_files(folder, written, range(distinct, count))
    return written


def link_files(folder: Path, files: Sequence[Path], numbers: Iterable[int]) -> None:
    """Put links to files, in turns, into folders of a thousand each: numbered as an archive of as many files."""
    for number in numbers:
        home = folder / f"{number // 1000:05}"
        home.mkdir(exist_ok=True)
        os.link(files[number % len(files)], home / f"{number:07}{files[0].suffix}")


def write_long_recording(path: Path, hours: float) -> None:
    """Write a telephone recording: 8 kHz, a byte a sample."""
    speech = np.concatenate(list(resample([_spoken()], SAMPLE_RATE, TELEPHONE_RATE)))
    left = round(hours * 3600 * TELEPHONE_RATE)
    with soundfile.SoundFile(path, "w", TELEPHONE_RATE, 1, subtype="ULAW", format="WAV") as file:
        while left > 0:
            file.write(speech[:left])
            left -= len(speech)


def _spoken() -> np.ndarray:
    """All prompts, one after the other."""
    return np.concatenate([read_audio(path).samples for path in sorted((PROMPTS / "audio").glob("*.flac"))])
