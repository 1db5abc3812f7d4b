"""Measure a part of graft: features, training, the service, bulk transcription or scaling.

`python -m jobs.bench NAME [--json FILE]` prints what it finds and writes the numbers as JSON.

features    FLAC -> log-mel on one core, beside soundfile + transformers' extractor
train       training steps beside the reference system's and AudioFlamingo3's, Ray's feeding beside a bare loop, two workers beside one
serve       the service beside its engine offline, under load, beside other servers, and with engines that come and go
bulk        Ray's transcription beside a bare loop, graft beside other transcribers, memory, and what batches change in bf16
scale       one run's batches split over 64 stand-ins for workers, and Ray Train with four workers
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from graft.errors import GraftError, OutputError
from graft.storage.atomic import write_atomic

from .benchmarks.counts import positive_float, positive_int
from .common.console import quiet_libraries

if TYPE_CHECKING:
    from .benchmarks.measuring import Findings

TRAIN_PARTS = ("step", "gains", "ingest", "workers")
BULK_PARTS = ("pipeline", "peers", "memory", "bf16")
SERVE_PARTS = ("saturation", "servers", "replicas")
SCALE_PARTS = ("split", "real", "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; exit code 2 and one line on stderr for bad input."""
    arguments = _parser().parse_args(argv)
    quiet_libraries()
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
    listening = argparse.ArgumentParser(add_help=False)
    listening.add_argument("--model", metavar="DIR", help="a trained graft; without one, what it would say is left out")
    listening.add_argument(
        "--speech", metavar="FILE", nargs="+", help="manifests of labelled clips (default: the bundled prompts)"
    )
    listening.add_argument("--threads", type=positive_int, default=1, help="of each model (default: %(default)s)")
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description="Measure a part of graft.")
    benchmarks = parser.add_subparsers(metavar="NAME", required=True)

    features = benchmarks.add_parser("features", parents=[common], help="FLAC to log-mel on one core")
    features.add_argument(
        "--seconds", type=positive_float, default=600.0, help="how much audio to decode (default: %(default)s)"
    )
    features.add_argument("--audio", metavar="DIR", help="16 kHz mono clips up to 30 s to use instead of made ones")
    features.set_defaults(benchmark=_features)

    train = benchmarks.add_parser(
        "train", parents=[common], help="training steps, feeding and workers (10 minutes on 2 idle cores)"
    )
    _add_only(train, TRAIN_PARTS)
    train.add_argument(
        "--graft", metavar="DIR", help="the graft to train; by default one is built from the bundled weights"
    )
    train.add_argument(
        "--clips", type=positive_int, default=16, help="how many to hear in steps (default: %(default)s)"
    )
    train.add_argument("--fed-clips", type=positive_int, default=1000, help="how many to feed (default: %(default)s)")
    train.add_argument("--repetitions", type=positive_int, default=3, help="of steps (default: %(default)s)")
    train.set_defaults(benchmark=_train)

    bulk = benchmarks.add_parser(
        "bulk", parents=[common, listening], help="bulk transcription (10 minutes on 2 idle cores)"
    )
    _add_only(bulk, BULK_PARTS)
    bulk.add_argument(
        "--seconds", type=positive_float, default=30.0, help="of each turn of a pipeline (default: %(default)s)"
    )
    bulk.add_argument("--repetitions", type=positive_int, default=1, help="of its turns (default: %(default)s)")
    bulk.add_argument(
        "--recordings",
        type=positive_int,
        default=10_000,
        help="short ones, for the driver's memory (default: %(default)s)",
    )
    bulk.add_argument(
        "--hours",
        type=positive_float,
        default=10.0,
        help="of one recording, for the workers' memory (default: %(default)s)",
    )
    bulk.add_argument("--rows", type=positive_int, default=1_000_000, help="of a plan (default: %(default)s)")
    bulk.set_defaults(benchmark=_bulk)

    serve = benchmarks.add_parser("serve", parents=[common, listening], help="the service (15 minutes on 2 idle cores)")
    _add_only(serve, SERVE_PARTS)
    serve.add_argument(
        "--clients", type=positive_int, default=32, help="that saturate the service (default: %(default)s)"
    )
    serve.add_argument("--seconds", type=positive_float, default=60.0, help="of each load (default: %(default)s)")
    serve.set_defaults(benchmark=_serve)

    scale = benchmarks.add_parser(
        "scale", parents=[common], help="more and more training workers (10 minutes on 2 idle cores)"
    )
    _add_only(scale, SCALE_PARTS)
    scale.add_argument(
        "--graft",
        metavar="DIR",
        help="whose widths and words to take; by default one is built from the bundled weights",
    )
    scale.add_argument("--consumers", type=positive_int, nargs="+", help="stand-ins for workers (default: 1 8 64)")
    scale.add_argument("--workers", type=positive_int, nargs="+", help="of training runs (default: 1 2 4)")
    scale.add_argument(
        "--seconds", type=positive_float, default=20.0, help="of each split, about (default: %(default)s)"
    )
    scale.add_argument("--steps", type=positive_int, default=60, help="of each training run (default: %(default)s)")
    scale.set_defaults(benchmark=_scale)
    return parser


def _add_only(parser: argparse.ArgumentParser, known: Sequence[str]) -> None:
    def parts(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        return found

    parser.add_argument("--only", metavar="PARTS", type=parts, default=known, help=f"some of {','.join(known)}")


def _features(arguments: argparse.Namespace) -> dict[str, Any]:
    from .benchmarks.features import bench_features

    findings = bench_features(arguments.audio, seconds=arguments.seconds)
    print(findings.text)
    return findings.numbers


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    from .benchmarks.train import TrainBench, bench_train

    names = ("graft", "clips", "repetitions", "fed_clips")
    return _told(bench_train(TrainBench(arguments.only, **{name: getattr(arguments, name) for name in names})))


def _bulk(arguments: argparse.Namespace) -> dict[str, Any]:
    from .benchmarks.bulk import BulkBench, bench_bulk

    names = ("model", "speech", "threads", "seconds", "repetitions", "recordings", "hours", "rows")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return _told(bench_bulk(BulkBench(arguments.only, **given)))


def _serve(arguments: argparse.Namespace) -> dict[str, Any]:
    from .benchmarks.serve import ServeBench, bench_serve

    names = ("model", "speech", "threads", "clients", "seconds")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return _told(bench_serve(ServeBench(arguments.only, **given)))


def _scale(arguments: argparse.Namespace) -> dict[str, Any]:
    from .benchmarks.scale import ScaleBench, bench_scale

    names = ("graft", "consumers", "workers", "seconds", "steps")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return _told(bench_scale(ScaleBench(arguments.only, **given)))


def _told(parts: "Iterable[tuple[str, Findings]]") -> dict[str, Any]:
    """Print each part as soon as it is measured; returns the numbers by part."""
    numbers = {}
    for part, findings in parts:
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
