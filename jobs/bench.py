"""Measure a part of graft: features, training, the service, bulk transcription, scaling or a GPU.

`graft bench NAME [--json FILE]` prints each part's time and what it measures, and writes the numbers as JSON.
"""

import argparse
import importlib
import inspect
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from graft.errors import GraftError, OutputError
from graft.storage.atomic import write_atomic

from .benchmarks.measuring import alone
from .common.cli import with_examples
from .common.console import quiet_libraries
from .common.speed import about, slowness

# Options by name, as argparse takes them.
Options = dict[str, dict[str, Any]]

MODEL: Options = {"model": dict(metavar="DIR", help="a graft; by default the bundled weights are built into one")}
PEERS: Options = {"speech": dict(nargs="+", metavar="FILE", help="manifests of labelled clips; by default the prompts")}
RANDOM: Options = {
    "shape": dict(choices=("7b", "2b", "tiny"), default="7b", help="size of the model; tiny runs anywhere"),
    "dtype": dict(choices=("fp32", "bf16"), default="bf16", help="precision of its weights"),
}


class Part(NamedTuple):
    """A part of a benchmark: its module, and how many minutes it takes by default on the machine of common/speed.py."""

    module: str
    minutes: float


# Each benchmark: its help, its parts, and its options. The part NAME is the function bench_NAME of its module; it is
# given the options that its parameters name.
BENCHMARKS: dict[str, tuple[str, Mapping[str, Part], Options]] = {
    "features": (
        "FLAC to log-mel on one core, beside soundfile and transformers' extractor",
        {"features": Part("features", 1)},
        {"seconds": dict(type=float, default=600.0, help="seconds of audio to decode")},
    ),
    "train": (
        "training steps beside others', Ray's feeding, two workers",
        {
            "step": Part("training_step", 3.5),
            "gains": Part("training_step", 2.5),
            "ingest": Part("scale", 2.5),
            "workers": Part("scale", 3),
        },
        MODEL
        | {
            "clips": dict(type=int, default=16, help="clips in a turn of steps"),
            "repetitions": dict(type=int, default=3, help="turns of steps"),
            "seconds": dict(type=float, default=180.0, help="most seconds of steps; there are fewer turns and clips"),
            "workers": dict(type=int, nargs="+", default=[1, 2], help="workers of stage 1"),
        },
    ),
    "bulk": (
        "Ray's transcription beside a bare loop, its memory, other transcribers",
        {"pipeline": Part("bulk", 4), "peers": Part("peers", 5), "memory": Part("bulk", 4), "bf16": Part("peers", 2)},
        MODEL | PEERS | {"seconds": dict(type=float, default=30.0, help="duration of each turn of a pipeline")},
    ),
    "serve": (
        "the service beside its engine and beside another server, engines come and go",
        {"saturation": Part("service", 5), "servers": Part("service", 8), "replicas": Part("service", 5)},
        MODEL
        | PEERS
        | {
            "clients": dict(type=int, default=32, help="clients that saturate the service"),
            "seconds": dict(type=float, default=60.0, help="duration of each load"),
        },
    ),
    "scale": (
        "a run's batches split over 64 stand-ins, Ray's feeding, stage 1 with up to four workers",
        {"split": Part("scale", 15), "ingest": Part("scale", 2.5), "workers": Part("scale", 7)},
        MODEL
        | {
            "consumers": dict(type=int, nargs="+", default=[1, 8, 64], help="stand-ins for workers"),
            "workers": dict(type=int, nargs="+", default=[1, 2, 4], help="workers of stage 1"),
            "seconds": dict(type=float, default=20.0, help="approximate duration of each split"),
        },
    ),
    "gpu": (
        "training steps on this machine's GPU with random weights",
        {"gpu": Part("gpu", 3)},
        RANDOM
        | {
            "stage": dict(type=int, choices=(1, 2), nargs="+", default=[1, 2], help="stages to measure"),
            "seconds": dict(type=float, default=10.0, help="duration of each measurement"),
            "budgets": dict(type=int, nargs="+", help="padded tokens of a batch; by default four that suit the shape"),
            "clip_s": dict(type=float, default=10.0, help="seconds of a clip"),
        },
    ),
    "engine": (
        "the transformers engine on this machine's GPU with random weights",
        {"engine": Part("gpu", 5)},
        RANDOM
        | {
            "clip_s": dict(type=float, nargs="+", default=[10.0, 30.0], help="seconds of a clip"),
            "rounds": dict(type=float, default=4.0, help="batches that are transcribed"),
            "batch_clips": dict(type=int, default=256, help="clips that are decoded together"),
        },
    ),
}

EXAMPLES = ("features", "train --only step,gains --json train.json", "serve --model small --clients 16")
"""Arguments that --help shows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; bad input ends it with exit code 2 and one line on stderr."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    (_, parts, names), options = BENCHMARKS[arguments.name], vars(arguments)
    for name in names:
        values = options[name] if isinstance(options[name], list) else [options[name]]
        if wrong := [number for number in values if type(number) in (int, float) and not 0 < number < math.inf]:
            parser.error(f"argument --{name.replace('_', '-')}: {wrong[0]} is not a finite number above 0")
    if unknown := set(arguments.only) - set(parts):
        parser.error(f"argument --only: {', '.join(sorted(unknown))}: choose from {', '.join(parts)}")
    try:
        numbers = _run(parts, options)
        if path := arguments.json:
            try:
                write_atomic(path, json.dumps(numbers, indent=2) + "\n")
            except OSError as error:
                reason = error.strerror or error
                raise OutputError(f"{path} cannot be written: {reason}: name another --json file") from error
    except GraftError as error:
        if arguments.debug:
            raise
        print(f"graft: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graft bench",
        description=with_examples("Measure a part of graft.", [f"bench {example}" for example in EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="NAME", required=True, dest="name")
    for name, (text, parts, options) in BENCHMARKS.items():
        minutes = sum(part.minutes for part in parts.values())
        command = commands.add_parser(name, help=f"{text} ({about(60 * minutes)})", description=text)
        command.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        parts_text = f"some of {','.join(parts)}" if len(parts) > 1 else argparse.SUPPRESS
        command.add_argument("--only", type=lambda text: text.split(","), default=list(parts), help=parts_text)
        for option, settings in options.items():
            shown = settings["help"] + (" (default: %(default)s)" if settings.get("default") else "")
            command.add_argument(f"--{option.replace('_', '-')}", **(settings | {"help": shown}))
    return parser


def _run(parts: Mapping[str, Part], options: dict[str, Any]) -> dict[str, Any]:
    """Run parts, each in a process of its own where a benchmark has several; returns the numbers by part.

    Where no graft is given, an untrained one is built from the bundled weights for as long. Raises ModelError.
    """
    with tempfile.TemporaryDirectory() as scratch:
        options = options | {"graft": options.get("model") or str(Path(scratch, "graft"))}
        if options.get("model"):
            from graft.checkpoints.loading import check_graft

            check_graft(options["graft"])
        elif "model" in options:
            from .build import BuildRecipe, run

            run(BuildRecipe(out=options["graft"]))
        # On a GPU the time is given, and the processor matters little.
        factor = 1.0 if any(part.module == "gpu" for part in parts.values()) else slowness("fp32")
        numbers = {}
        for name in options["only"]:
            part = parts[name]
            print(f"\n{name}: {about(60 * part.minutes * factor)} with the default options", flush=True)
            if len(parts) == 1:
                return _run_part(name, part.module, options)
            numbers[name] = alone(_run_part, name, part.module, options)
        return numbers


def _run_part(part: str, module: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one part; returns its numbers and the machine's load: beyond the benchmark's own, wall times mislead."""
    quiet_libraries()
    function = getattr(importlib.import_module(f".benchmarks.{module}", __package__), f"bench_{part}")
    numbers = function(**{name: options[name] for name in inspect.signature(function).parameters})
    numbers["load_average"] = os.getloadavg()[0]
    print(f"load_average {numbers['load_average']:.2f}", flush=True)
    return numbers


if __name__ == "__main__":
    sys.exit(main())
