"""Benchmarks: `python -m jobs.bench NAME [--json FILE]` prints a table of numbers and writes the same numbers as JSON.

features    FLAC -> log-mel on one core, beside soundfile + transformers' extractor
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from graft.audio import SAMPLE_RATE, read_audio
from graft.errors import AudioError, GraftError, OutputError
from graft.features import HOP_LENGTH, WINDOW_FRAMES, Featurizer
from jobs.outputs import write_atomic

Numbers = dict[str, float]
REPETITIONS = 9


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; exit code 2 and one line on stderr for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        numbers: Numbers = arguments.benchmark(arguments)
        print(_table(numbers))
        if arguments.json:
            _write_json(arguments.json, numbers)
    except GraftError as error:
        if arguments.debug:
            raise
        print(f"graft: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", metavar="FILE", help="also write the numbers there")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description="Measure a part of graft.")
    benchmarks = parser.add_subparsers(metavar="NAME", required=True)

    features = benchmarks.add_parser("features", parents=[common], help="FLAC to log-mel on one core")
    features.add_argument("--seconds", type=float, default=600.0, help="how much audio to decode (default: %(default)s)")
    features.add_argument("--audio", metavar="DIR", help="16 kHz mono clips up to 30 s to use instead of made ones")
    features.set_defaults(benchmark=bench_features)
    return parser


def _table(numbers: Numbers) -> str:
    width = max(map(len, numbers))
    return "\n".join(f"{name:<{width}}  {value:>12{',' if isinstance(value, int) else ',.2f'}}" for name, value in numbers.items())


def _write_json(path: str, numbers: Numbers) -> None:
    try:
        write_atomic(path, json.dumps(numbers, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}: name another --json file") from error


def bench_features(arguments: argparse.Namespace) -> Numbers:
    """Seconds of audio per second on one core (medians), for graft and for what it is measured against, and their ratio."""
    torch.set_num_threads(1)
    featurizer, extractor = Featurizer(80), WhisperFeatureExtractor(feature_size=80)

    def with_graft(path: Path) -> None:
        featurizer(read_audio(path))

    def with_transformers(path: Path) -> None:
        samples, _ = soundfile.read(path, dtype="float32")
        extractor(samples, sampling_rate=SAMPLE_RATE, padding="do_not_pad", return_tensors="np")

    with tempfile.TemporaryDirectory() as folder:
        clips = _found_clips(Path(arguments.audio), arguments.seconds) if arguments.audio else _made_clips(Path(folder), arguments.seconds)
        audio_s = sum(soundfile.info(path).duration for path in clips)
        graft_s, transformers_s = _interleaved(clips, with_graft, with_transformers)
    return {
        "clips": len(clips),
        "audio_s": audio_s,
        "repetitions": REPETITIONS,
        "graft_rtfx": audio_s / statistics.median(graft_s),
        "transformers_rtfx": audio_s / statistics.median(transformers_s),
        "ratio": statistics.median(theirs / ours for ours, theirs in zip(graft_s, transformers_s, strict=True)),
    }


def _interleaved(clips: Sequence[Path], *ways: Callable[[Path], None]) -> list[list[float]]:
    """Seconds that each way takes for all clips, REPETITIONS times after a warm-up, in turns so that a busy machine slows all alike."""
    taken: list[list[float]] = [[] for _ in ways]
    for repetition in range(REPETITIONS + 1):
        for way, seconds in zip(ways, taken, strict=True):
            started = time.perf_counter()
            for clip in clips:
                way(clip)
            if repetition > 0:
                seconds.append(time.perf_counter() - started)
    return taken


def _found_clips(folder: Path, seconds: float) -> list[Path]:
    """Clips of a folder, in order of name, until they last `seconds`, without those that the extractor can't take as they are."""
    clips: list[Path] = []
    total_s = 0.0
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".flac", ".wav", ".ogg", ".opus", ".mp3")):
        try:
            info = soundfile.info(path)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{path}: not readable as audio ({error.error_string}): take it out of the folder") from error
        if (info.samplerate, info.channels) == (SAMPLE_RATE, 1) and 0 < info.frames <= WINDOW_FRAMES * HOP_LENGTH and total_s < seconds:
            clips.append(path)
            total_s += info.duration
    if not clips:
        raise AudioError(f"{folder}: no 16 kHz mono clips of up to 30 s in it: name a folder that holds some, or leave --audio out")
    return clips


def _made_clips(folder: Path, seconds: float) -> list[Path]:
    """FLAC files of 2-20 s, `seconds` altogether (at least one file)."""
    rng = np.random.default_rng(0)
    clips: list[Path] = []
    total_s = 0.0
    while not clips or total_s < seconds:
        duration_s = rng.uniform(2, 20)
        clips.append(folder / f"{len(clips):05d}.flac")
        soundfile.write(clips[-1], _speech_like(rng, int(duration_s * SAMPLE_RATE)), SAMPLE_RATE, subtype="PCM_16")
        total_s += duration_s
    return clips


def _speech_like(rng: np.random.Generator, sample_count: int) -> np.ndarray:
    """Noise with the long-term spectrum of speech, falling 9 dB an octave above 500 Hz, in syllables of 1/4 s with pauses between."""
    spectrum = np.fft.rfft(rng.standard_normal(sample_count))
    frequency = np.fft.rfftfreq(sample_count, 1 / SAMPLE_RATE)
    noise = np.fft.irfft(spectrum * (1 + frequency / 500) ** -1.5, sample_count)
    syllables = np.maximum(0, np.sin(2 * np.pi * 2 * np.arange(sample_count) / SAMPLE_RATE)) ** 2
    return 0.3 * noise / np.abs(noise).max() * (syllables + 0.01)


if __name__ == "__main__":
    sys.exit(main())
