"""Benchmarks: `python -m jobs.bench NAME [--json FILE]` prints what it finds and writes the numbers as JSON.

features    FLAC -> log-mel on one core, beside soundfile + transformers' extractor
train       training steps beside the reference system's and AudioFlamingo3's, Ray's feeding beside a bare loop, two workers beside one
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from graft.errors import GraftError, OutputError
from jobs.outputs import write_atomic

PARTS = ("step", "gains", "ingest", "workers")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; exit code 2 and one line on stderr for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        numbers = arguments.benchmark(arguments)
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
    features.set_defaults(benchmark=_features)

    train = benchmarks.add_parser("train", parents=[common], help="training steps, feeding and workers (10 minutes on 2 idle cores)")
    train.add_argument("--only", metavar="PARTS", type=_parts, default=PARTS, help=f"some of {','.join(PARTS)}")
    train.add_argument("--graft", metavar="DIR", help="the graft to train; by default one is built from the bundled weights")
    train.add_argument("--clips", type=int, default=16, help="how many to hear in steps (default: %(default)s)")
    train.add_argument("--fed-clips", type=int, default=1000, help="how many to feed (default: %(default)s)")
    train.add_argument("--repetitions", type=int, default=3, help="of steps (default: %(default)s)")
    train.set_defaults(benchmark=_train)
    return parser


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    return parts


def _features(arguments: argparse.Namespace) -> dict[str, Any]:
    from jobs.benchmarks.features import bench_features

    findings = bench_features(arguments.audio, seconds=arguments.seconds)
    print(findings.text)
    return findings.numbers


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    from jobs.benchmarks.train import TrainBench, bench_train

    names = ("graft", "clips", "repetitions", "fed_clips")
    numbers: dict[str, Any] = {}
    for part, findings in bench_train(TrainBench(arguments.only, **{name: getattr(arguments, name) for name in names})):
        print(f"{part}\n{findings.text}\n", flush=True)
        numbers[part] = findings.numbers
    return numbers


def _write_json(path: str, numbers: dict[str, Any]) -> None:
    try:
        write_atomic(path, json.dumps(numbers, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}: name another --json file") from error


if __name__ == "__main__":
    sys.exit(main())
