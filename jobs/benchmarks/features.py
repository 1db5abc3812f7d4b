"""FLAC to log-mel on one core, beside soundfile and transformers' extractor."""

import statistics
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from graft.audio.clip import SAMPLE_RATE, AudioClip, encode_flac, read_audio
from graft.audio.features import HOP_LENGTH, WINDOW_FRAMES, Featurizer
from graft.errors import AudioError

from .measuring import Findings, in_turns, list_numbers, median_ratio
from .speech import speech_like

REPETITIONS = 9


def bench_features(audio: str | None, *, seconds: float) -> Findings:
    """Seconds of audio per second on one core (medians), for graft and for what it is measured against, and their ratio.

    `audio` is a folder of clips, None for made ones. Raises AudioError for a folder without any.
    """
    torch.set_num_threads(1)
    featurizer, extractor = Featurizer(80), WhisperFeatureExtractor(feature_size=80)

    def with_graft() -> None:
        for path in clips:
            featurizer(read_audio(path))

    def with_transformers() -> None:
        for path in clips:
            samples, _ = soundfile.read(path, dtype="float32")
            extractor(samples, sampling_rate=SAMPLE_RATE, padding="do_not_pad", return_tensors="np")

    with tempfile.TemporaryDirectory() as folder:
        clips = _found_clips(Path(audio), seconds) if audio else _made_clips(Path(folder), seconds)
        audio_s = sum(soundfile.info(path).duration for path in clips)
        spent = in_turns({"graft": with_graft, "transformers": with_transformers}, REPETITIONS + 1)
    graft_s, transformers_s = (
        [one.wall_s for one in spent[name][1:]] for name in ("graft", "transformers")
    )  # the first turn warms up
    numbers = {
        "clips": len(clips),
        "audio_s": audio_s,
        "repetitions": REPETITIONS,
        "graft_rtfx": audio_s / statistics.median(graft_s),
        "transformers_rtfx": audio_s / statistics.median(transformers_s),
        "ratio": median_ratio(transformers_s, graft_s),
    }
    return Findings(numbers, list_numbers(numbers))


def _found_clips(folder: Path, seconds: float) -> list[Path]:
    """Clips of a folder, in order of name, until they last `seconds`, without those that the extractor can't take as they are."""
    clips: list[Path] = []
    total_s = 0.0
    for path in sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in (".flac", ".wav", ".ogg", ".opus", ".mp3")
    ):
        try:
            info = soundfile.info(path)
        except soundfile.LibsndfileError as error:
            raise AudioError(
                f"{path}: not readable as audio ({error.error_string}): take it out of the folder"
            ) from error
        if (
            (info.samplerate, info.channels) == (SAMPLE_RATE, 1)
            and 0 < info.frames <= WINDOW_FRAMES * HOP_LENGTH
            and total_s < seconds
        ):
            clips.append(path)
            total_s += info.duration
    if not clips:
        raise AudioError(
            f"{folder}: no 16 kHz mono clips of up to 30 s in it: name a folder that holds some, or leave --audio out"
        )
    return clips


def _made_clips(folder: Path, seconds: float) -> list[Path]:
    """FLAC files of 2-20 s, `seconds` altogether (at least one file)."""
    rng = np.random.default_rng(0)
    clips: list[Path] = []
    total_s = 0.0
    while not clips or total_s < seconds:
        duration_s = rng.uniform(2, 20)
        clips.append(folder / f"{len(clips):05d}.flac")
        clips[-1].write_bytes(
            encode_flac(AudioClip(speech_like(rng, int(duration_s * SAMPLE_RATE)).astype(np.float32)))
        )
        total_s += duration_s
    return clips
