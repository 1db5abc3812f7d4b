"""Run a command: arguments -> recipe -> the command's `run`, or its `plan` -> exit code.

Every command is called as `graft COMMAND --recipe NAME key=value ... [--plan] [--debug]`. `--key=value` and
`--key value` mean key=value, and `--some-key` means some_key=true where the key is a switch. An error that a user can
mend (GraftError, also one raised in Ray's workers) ends as one line on stderr with exit code 2; any other error is a
bug and keeps its traceback.
"""

import argparse
import contextlib
import difflib
import errno
import importlib.metadata
import io
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from graft.config import R, Recipe, read_recipe
from graft.errors import GraftError, RecipeError, install_command
from graft.keys import alternatives, first_sentence, help_lines, values_text
from graft.storage.local_paths import utf8_location

from .console import json_text, printable, quiet_libraries
from .inputs import check_inputs

STOPPED = 128 + signal.SIGTERM
"""Exit code of a job that was stopped by SIGTERM and saved its state first."""

RECIPES = Path(__file__).parents[1] / "recipes"
"""Folder of the recipes that come with graft, which are taken by their names."""

# The attributes in which Ray and Ray Train keep the error that they wrap.
_INNER_ERRORS = (
    "cause",
    "_base_exc",
    "training_failed_error",
    "controller_failure",
    "health_check_failure",
    "__cause__",
)
_KEY = re.compile(r"[A-Za-z_][\w.]*=")
_GRAFT_ERROR_LINE = re.compile(r"^graft\.errors\.\w+: (.+)$", re.MULTILINE)


VALUES = """\
Text is taken as it is typed. A list [...] is one value, or several as a,b; a value with a comma stands in brackets and
quotes, as in '["a, b.wav"]'. A group {...} is given as group.key=value or {key: value}. key= or key=null gives a key no
value where null is allowed. Of a key that is given twice, the last value counts."""
"""How values are written, for --help."""


class PlanOptions(Recipe):
    """Assumptions of --plan about the devices, their price and the data."""

    device: str = "h200"
    """GPU to plan for, such as h200, h100, a100, l40s or 4090."""
    price: float | None = Field(default=None, ge=0)
    """Price of one device-hour in your currency; without it the plan states no cost."""
    share: float = Field(default=0.45, gt=0, le=1)
    """Share of the device's peak arithmetic rate that training is expected to reach."""
    hours: float = Field(default=100.0, gt=0)
    """Hours of speech to plan for when data= is not given."""
    clip_s: float = Field(default=10.0, ge=0.1, le=30)
    """Mean length of a clip in seconds when data= is not given."""
    network_gbit: float | None = Field(default=None, gt=0)
    """Gbit/s by which each worker reaches the others over a network; without it the plan compares 25, 100 and 400."""


def run_job(
    recipe_class: type[R],
    run: Callable[[R], object],
    *,
    summary: str | None,
    argv: Sequence[str] | None = None,
    plan: Callable[[R, Any], None] | None = None,
    plan_options: type[Recipe] = PlanOptions,
    examples: Sequence[str] = (),
    command: str | None = None,
    words: str | None = None,
) -> int:
    """Run a command on the recipe that the command line gives, or `plan` if --plan is given; returns the exit code.

    `command` is the command's name, by default that of the module that `run` stands in. `words` is the key of which
    arguments without a `=` are the values, such as the files of `graft transcribe a.flac b.flac`. `examples` are
    arguments that --help shows, and `plan_options` the class of the options that go with --plan. Files that the recipe
    names must exist.

    The code is 0 or the integer that `run` returns, 2 after a GraftError, which is printed as one line, 130 after
    Ctrl-C, and 141 where nobody reads the output any more. Other exceptions pass through. With --plan only `model` is
    required: other required keys default to None.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    recipe: Recipe | None = None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks, as stderr writes it
    try:
        command = command or _command_of(run)
        texts = _help_texts(recipe_class, summary, [f"{command} {example}" for example in examples])
        usage = _usage(command, words, plans=plan is not None)
        options, overrides = _read_arguments(
            recipe_class, argv, usage=usage, texts=texts, plan_options=plan_options if plan else None, words=words
        )
        recipe_path = options.recipe and find_recipe(options.recipe, recipe_class, command)
        quiet_libraries()
        if plan and (assumptions := _plan_options(options, plan_options)):
            result = plan(read_recipe(_requiring_model_only(recipe_class), recipe_path, overrides), assumptions)
        else:
            recipe = read_recipe(recipe_class, recipe_path, overrides)
            check_inputs(recipe)
            result = run(recipe)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        print("graft: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _is_output_closed():
            raise  # it was another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more as it ends
        return 128 + signal.SIGPIPE
    except Exception as error:
        message = user_message(error)
        if message is None and (fault := disk_fault(error, getattr(recipe, "out", None) or ".")):
            message = f"{fault}: mend that, then run the same command again"
        if message is None:
            raise
        if "--debug" in argv:
            traceback.print_exc()
        print(f"graft: error: {printable(' '.join(message.split()))}", file=sys.stderr)
        return 2


def user_message(error: BaseException) -> str | None:
    """Find the message of an error that the user can mend, also inside Ray's wrappers; None when the error is a bug."""
    chain = list(_errors_inside(error))
    for inner in chain:
        # A RayTaskError(DataError) is a DataError too, but its text is a traceback; the error it wraps comes later.
        if isinstance(inner, GraftError) and not isinstance(getattr(inner, "cause", None), BaseException):
            return str(inner)
    for inner in chain:
        if isinstance(inner, ModuleNotFoundError) and (extra := _extra_that_installs(inner.name or "")) is not None:
            return f"{inner.name} is not installed: {install_command(extra)}"
    # Ray Data and dying actors send only the traceback's text across processes.
    lines = [
        line
        for inner in chain
        if inner.__class__.__module__.startswith("ray.")
        for line in _GRAFT_ERROR_LINE.findall(str(inner))
    ]
    return lines[-1] if lines else None


def disk_fault(error: BaseException, out: str | os.PathLike[str]) -> str | None:
    """Say that the disk of a command's output folder is full or cannot be written, where that is what failed.

    An error may come out of Ray as text alone, so its text is what tells. Ray's own files and those of libraries may
    have filled the disk of the temporary folder instead.
    """
    text = "\n".join(map(str, _errors_inside(error)))
    folder = Path(out).absolute()
    for code in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(code) in text:
            with contextlib.suppress(OSError):
                folder = min((folder, Path(tempfile.gettempdir())), key=_free_share)
            return f"the disk of {folder} is full ({os.strerror(code)})"
    for code in (errno.EROFS, errno.EFBIG):
        if os.strerror(code) in text:
            return f"{folder} cannot be written ({os.strerror(code)})"
    fault = re.search(rf"^(?:\w+: )?\[Errno (\d+)\] .*{re.escape(str(folder))}", text, re.MULTILINE)
    return f"{folder} cannot be written ({os.strerror(int(fault[1]))})" if fault else None


def _free_share(folder: Path) -> float:
    """Return which share of a disk is free, of its bytes or of the files that it can hold, whichever is less."""
    disk = os.statvfs(folder)
    return min(disk.f_bavail / max(disk.f_blocks, 1), disk.f_favail / disk.f_files if disk.f_files else 1.0)


def _errors_inside(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and the errors that it wraps, outermost first, each once."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inner = [getattr(current, name, None) for name in _INNER_ERRORS]
        failures = getattr(current, "worker_failures", None)  # rank -> exception
        inner += failures.values() if isinstance(failures, dict) else []
        waiting += [found for found in inner if isinstance(found, BaseException)]


def _extra_that_installs(module: str) -> str | None:
    """Name the extra of graft that installs a package: "ray" -> "jobs"; "" for a core dependency, None if unknown."""
    try:
        requirements = importlib.metadata.requires("graft-asr") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source folder
        return None
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        if name and name[0].replace("-", "_").lower() == module.lower():
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
            return extra[1] if extra else ""
    return None


def _command_of(run: Callable[..., object]) -> str:
    """Name the command whose module a function stands in, also where that module is the one that Python runs."""
    spec = getattr(sys.modules.get(run.__module__ or ""), "__spec__", None)
    return spec.name.rpartition(".")[2] if spec else "COMMAND"


def _usage(command: str, words: str | None, *, plans: bool) -> str:
    given, planned = f" [{words} ...]" if words else "", " [--plan ...]" if plans else ""
    return f"graft {command}{given} [--recipe NAME] [key=value ...]{planned} [--debug]"


def _help_texts(recipe_class: type[Recipe], summary: str | None, examples: Sequence[str]) -> str:
    """Write what --help says before the options: what the command does, examples, and its keys."""
    lines = [with_examples(summary, examples)]
    lines += ["", "keys, given as key=value, --key=value or --key value (--key alone for true):"]
    width = min(100, shutil.get_terminal_size().columns)
    return "\n".join([*lines, *help_lines(recipe_class, width=width), "", VALUES])


def with_examples(summary: str | None, examples: Sequence[str]) -> str:
    """Put examples, given without `graft`, after the first line of what a command does."""
    title, _, more = (summary or "").strip().partition("\n")
    lines = ["", "examples:", *(f"  graft {example}".rstrip() for example in examples)] if examples else []
    return "\n".join([title, *lines, *(["", more.strip()] if more.strip() else [])])


def _read_arguments(
    recipe_class: type[Recipe],
    argv: Sequence[str],
    *,
    usage: str = "",
    texts: str = "",
    plan_options: type[Recipe] | None = None,
    words: str | None = None,
) -> tuple[argparse.Namespace, list[str]]:
    """Read the options of a command line, and all else as `key=value`. --help prints and exits."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        usage=usage, description=texts, formatter_class=formatter, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="recipe of graft by its name, or a YAML file with keys; key=value (or key.sub=value) overrides it",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if plan_options:
        planning = parser.add_argument_group("planning")
        planning.add_argument(
            "--plan", action="store_true", help="print memory, hours and cost of the run and start nothing"
        )
        for name, field in plan_options.model_fields.items():
            default = "" if field.default is None else f" (default {field.default})"
            text = f"{first_sentence(field.description)}{default}".replace("%", "%%")
            metavar = values_text(field.annotation).removesuffix(" | null").upper()
            planning.add_argument(
                *dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")), metavar=metavar, help=text
            )
    try:
        options, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise RecipeError(f"{error}: see --help") from error
    return options, list(_overrides(overrides, recipe_class.model_fields, words))


def _overrides(arguments: Sequence[str], keys: Mapping[str, FieldInfo], words: str | None = None) -> Iterator[str]:
    """Yield the arguments that argparse left over, each as key=value; of the `keys`, switches need no value.

    Arguments without a key are values of the key that `words` names.
    """
    left, given = iter(arguments), list[str]()
    for argument in left:
        if words and not argument.startswith("-") and not _names_key(argument, keys):
            given.append(utf8_location(argument))
            continue
        override = argument.removeprefix("--")
        if override != argument:
            key, equals, value = override.partition("=")
            key = key.replace("-", "_")
            if not equals and key in keys and bool in alternatives(keys[key].annotation):
                equals, value = "=", "true"
            elif not equals and not (value := next(left, "--")).startswith("--"):
                equals = "="
            elif not equals and (name := key.partition(".")[0]) not in keys:
                longer = [known for known in keys if known.startswith(name)]
                close = longer or difflib.get_close_matches(name, keys, n=1)
                hint = (
                    f"did you mean {close[0]!r}? --help lists all"
                    if close
                    else f"known here: {', '.join(sorted(keys))}"
                )
                raise RecipeError(f"unknown key {key} ({hint})")
            override = f"{key}{equals}{value}" if equals else ""
        if words and override.startswith(f"{words}=") and not override.startswith(f"{words}=["):
            override = f"{words}={utf8_location(override.removeprefix(f'{words}='))}"
        if "=" not in override or override.startswith("-"):
            hint = "" if argument.startswith("-") else " (a value with spaces stands in quotes)"
            if words and os.path.exists(argument):
                hint = f" (the file is ./{argument})"
            raise RecipeError(f"argument {argument!r} is not key=value or --key value{hint}: see --help")
        if given and override.startswith(f"{words}="):
            raise RecipeError(
                f"argument {argument!r} says again what {given[0]!r} says: give all of {words} in one way"
            )
        yield override
    if given:
        yield f"{words}={json_text(given)}"


def _is_output_closed() -> bool:
    """Tell whether whoever read the output, such as `head`, wants no more of it."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _names_key(argument: str, keys: Mapping[str, FieldInfo]) -> bool:
    """Return whether an argument begins with a key, and is not a file whose name holds an equals sign."""
    key = _KEY.match(argument)
    return key is not None and (key[0].partition("=")[0].partition(".")[0] in keys or not Path(argument).exists())


def find_recipe(name: str, recipe_class: type[Recipe], command: str) -> str:
    """Find the file of a recipe: a path, or the name of one that comes with graft. A path that exists is preferred.

    Raises RecipeError, which lists the recipes that have only keys of `recipe_class` and are not named after another
    command, the one with the closest name first.
    """
    if Path(name).exists() and not Path(name).is_dir():
        return name
    known = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    keys, others = recipe_class.model_fields.keys(), {path.stem for path in RECIPES.parent.glob("*.py")} - {command}
    if stem in known and (other := stem.rpartition("-")[2]) in others:
        raise RecipeError(f"recipe {name} is one of graft {other}: name one of graft {command}")
    if stem in known:
        return str(known[stem])
    fitting = [
        one
        for one, path in known.items()
        if one.rpartition("-")[2] not in others and yaml.safe_load(path.read_text(encoding="utf-8")).keys() <= keys
    ]
    close = difflib.get_close_matches(f"{stem.removesuffix(f'-{command}')}-{command}", fitting, n=len(known), cutoff=0)
    listed = f"; recipes of graft for {command} are {', '.join(close)}" if close else ""
    raise RecipeError(f"recipe {name}: no such file{listed}")


def _plan_options(options: argparse.Namespace, plan_options: type[R]) -> R | None:
    """Read the options of --plan; None when --plan is not given. Raises RecipeError for an option without it."""
    given = {name: value for name in plan_options.model_fields if (value := getattr(options, name)) is not None}
    if given and not options.plan:
        raise RecipeError(f"argument --{next(iter(given)).replace('_', '-')} goes with --plan: see --help")
    assumptions = [f"{name}={value}" for name, value in given.items()]
    return read_recipe(plan_options, None, assumptions) if options.plan else None


def _requiring_model_only(recipe_class: type[R]) -> type[R]:
    """Derive a recipe class that requires `model` only; the other required keys default to None."""
    required = {
        name: field.annotation
        for name, field in recipe_class.model_fields.items()
        if field.is_required() and name != "model"
    }
    optional: dict[str, Any] = {
        name: (annotation | None, None) for name, annotation in required.items() if annotation is not None
    }
    return create_model(recipe_class.__name__, __base__=recipe_class, **optional)
