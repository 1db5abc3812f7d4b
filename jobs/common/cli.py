"""Run a command: arguments -> recipe -> the command's `run`, or its `plan` -> exit code.

Every command is called as `graft COMMAND --recipe NAME key=value ... [--plan] [--debug]`. `--key=value` and
`--key value` mean key=value, and `--some-key` means some_key=true where the key is a switch. An error that a user can
mend (GraftError, also one raised in Ray's workers) ends as one line on stderr with exit code 2; any other error is a
bug and keeps its traceback.
"""

import argparse
import difflib
import importlib.metadata
import json
import re
import shutil
import signal
import sys
import textwrap
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import yaml
from pydantic import BaseModel, Field, create_model
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from graft.config import R, Recipe, read_recipe
from graft.errors import GraftError, RecipeError, install_command

from .console import quiet_libraries

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
TYPE_NAMES: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true | false", NoneType: "null"}
_KEY = re.compile(r"[A-Za-z_][\w.]*=")
_GRAFT_ERROR_LINE = re.compile(r"^graft\.errors\.\w+: (.+)$", re.MULTILINE)


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
    plan: Callable[[R, PlanOptions], None] | None = None,
    command: str | None = None,
    words: str | None = None,
) -> int:
    """Run a command on the recipe that the command line gives, or `plan` if --plan is given; returns the exit code.

    `command` is the command's name, by default that of the module that `run` stands in. `words` is the key of which
    arguments without a `=` are the values, such as the files of `graft transcribe a.flac b.flac`.

    The code is 0 or the integer that `run` returns, 2 after a GraftError, which is printed as one line, and 130 after
    Ctrl-C. Other exceptions pass through. With --plan only `model` is required: other required keys default to None.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        command = command or _command_of(run)
        options, overrides = _read_arguments(
            recipe_class, summary, argv, plans=plan is not None, command=command, words=words
        )
        recipe_path = options.recipe and find_recipe(options.recipe, recipe_class, command)
        quiet_libraries()
        if plan and (plan_options := _plan_options(options)):
            plan(read_recipe(_requiring_model_only(recipe_class), recipe_path, overrides), plan_options)
            return 0
        result = run(read_recipe(recipe_class, recipe_path, overrides))
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        print("graft: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        if "--debug" in argv:
            traceback.print_exc()
        print(f"graft: error: {' '.join(message.split())}", file=sys.stderr)
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


def _read_arguments(
    recipe_class: type[Recipe],
    summary: str | None,
    argv: Sequence[str],
    *,
    plans: bool,
    command: str = "COMMAND",
    words: str | None = None,
) -> tuple[argparse.Namespace, list[str]]:
    given = [f"[{words} ...]"] if words else []
    planned = ["[--plan ...]"] if plans else []
    usage = ["graft", command, *given, "[--recipe NAME]", "[key=value ...]", *planned, "[--debug]"]
    parser = argparse.ArgumentParser(
        usage=" ".join(usage),
        description=summary,
        epilog="\n".join(
            [
                "keys of the recipe, given as key=value, --key=value or --key value (--key alone for true):",
                *describe_keys(recipe_class, width=min(100, shutil.get_terminal_size().columns)),
                "",
                "Values are YAML; {...} is a group of keys, given as group.key=value; [...] is a list.",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="recipe of graft by its name, or a YAML file with keys; key=value (or key.sub=value) overrides it",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if plans:
        planning = parser.add_argument_group("planning")
        planning.add_argument(
            "--plan", action="store_true", help="print memory, steps, hours and cost of the run and start nothing"
        )
        for name, field in PlanOptions.model_fields.items():
            default = "" if field.default is None else f" (default {field.default})"
            planning.add_argument(f"--{name}", metavar="...", help=f"{field.description}{default}")
    try:
        options, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise RecipeError(f"{error}: see --help") from error
    switches = {name for name, field in recipe_class.model_fields.items() if field.annotation is bool}
    return options, list(_overrides(overrides, switches, words))


def _overrides(arguments: Sequence[str], switches: Set[str], words: str | None = None) -> Iterator[str]:
    """Yield the arguments that argparse left over, each as key=value; `switches` are the keys that need no value.

    Arguments without a key are values of the key that `words` names.
    """
    left, given = iter(arguments), list[str]()
    for argument in left:
        if words and not argument.startswith("-") and not _KEY.match(argument):
            given.append(argument)
            continue
        override = argument.removeprefix("--")
        if override != argument:
            key, equals, value = override.partition("=")
            key = key.replace("-", "_")
            if not equals and key in switches:
                equals, value = "=", "true"
            elif not equals and not (value := next(left, "--")).startswith("--"):
                equals = "="
            override = f"{key}{equals}{value}" if equals else ""
        if "=" not in override or override.startswith("-"):
            raise RecipeError(f"argument {argument!r} is not key=value or --key value: see --help")
        if given and override.startswith(f"{words}="):
            raise RecipeError(
                f"argument {argument!r} says again what {given[0]!r} says: give all of {words} in one way"
            )
        yield override
    if given:
        yield f"{words}={json.dumps(given, ensure_ascii=False)}"


def find_recipe(name: str, recipe_class: type[Recipe], command: str) -> str:
    """Find the file of a recipe: a path, or the name of one that comes with graft. A path that exists is preferred.

    Raises RecipeError, which lists the recipes that have only keys of `recipe_class`, the one with the closest name
    first.
    """
    if Path(name).exists() and not Path(name).is_dir():
        return name
    known = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    if stem in known:
        return str(known[stem])
    keys = recipe_class.model_fields.keys()
    fitting = [one for one, path in known.items() if yaml.safe_load(path.read_text(encoding="utf-8")).keys() <= keys]
    close = difflib.get_close_matches(f"{stem.removesuffix(f'-{command}')}-{command}", fitting, n=len(known), cutoff=0)
    listed = f"; recipes of graft for {command} are {', '.join(close)}" if close else ""
    raise RecipeError(f"recipe {name}: no such file{listed}")


def _plan_options(options: argparse.Namespace) -> PlanOptions | None:
    """Read the options of --plan; None when --plan is not given. Raises RecipeError for an option without it."""
    given = {name: value for name in PlanOptions.model_fields if (value := getattr(options, name)) is not None}
    if given and not options.plan:
        raise RecipeError(f"argument --{next(iter(given))} goes with --plan: see --help")
    return (
        read_recipe(PlanOptions, None, [f"{name}={json.dumps(value)}" for name, value in given.items()])
        if options.plan
        else None
    )


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


KeyGroup = tuple[type[BaseModel], BaseModel | None, list[str]]
"""A recipe class or a group inside it, the default values of its keys there, and the keys that hold it."""


def describe_keys(recipe_class: type[BaseModel], *, width: int) -> Iterator[str]:
    """Yield the lines that document each key: the recipe's own first, then one section for each nested group."""
    for model, defaults, holders in _key_groups(recipe_class):
        prefix = f"{holders[0]}." if holders else ""
        if prefix:
            heading = f"{', '.join(holders)}: {_one_line(model.__doc__)}"
            yield from ["", *textwrap.wrap(heading, width, subsequent_indent="  ")]
        for name, field in model.model_fields.items():
            yield f"  {prefix}{name}{_value_text(field, _default(defaults, name, field))}"
            indent = " " * 6
            yield from textwrap.wrap(
                _one_line(field.description), width, initial_indent=indent, subsequent_indent=indent
            )


def _key_groups(recipe_class: type[BaseModel]) -> list[KeyGroup]:
    """List a recipe class and the groups inside it, each once though several keys hold it with the same defaults."""
    groups: list[KeyGroup] = [(recipe_class, None, [])]
    for owner, defaults, holders in groups:  # the list grows while it is read
        prefix = f"{holders[0]}." if holders else ""
        for name, field in owner.model_fields.items():
            for model, suffix in _nested_models(field.annotation).items():
                default = _default(defaults, name, field)
                own = default if isinstance(default, model) else None
                known = [group for group in groups if group[0] is model and group[1] == own]
                groups += [] if known else [(model, own, [])]
                (known or groups)[-1][2].append(f"{prefix}{name}{suffix}")
    return groups


def _nested_models(annotation: Any) -> dict[type[BaseModel], str]:
    """Map each recipe class inside an annotation to the suffix of its key: .NAME in a dict, [] in a list, or none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation: ""}
    origin, found = typing.get_origin(annotation), dict[type[BaseModel], str]()
    suffix = ".NAME" if origin is dict else "[]" if origin in (list, tuple, Sequence) else ""
    for part in typing.get_args(annotation):
        for model, inner in _nested_models(part).items():
            found.setdefault(model, f"{suffix}{inner}")
    return found


def _default(defaults: BaseModel | None, name: str, field: FieldInfo) -> Any:
    """Return the default of a key in its group; pydantic's undefined value where the key is required."""
    if defaults is not None:
        return getattr(defaults, name)
    return field.get_default(call_default_factory=True, validated_data={})


def _value_text(field: FieldInfo, default: Any) -> str:
    """Write a key's default and allowed values: ` = nf4 (nf4 | none)`, ` (text, required)`."""
    if default is PydanticUndefined:
        return f" ({_type_text(field.annotation)}, required)"
    if isinstance(default, BaseModel):
        return f" ({_type_text(field.annotation)})"
    value = yaml.safe_dump(default, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f" = {value} ({_type_text(field.annotation)})"


def _type_text(annotation: Any) -> str:
    """Write which values an annotation allows: `a | b`, `[text, ...]`, `{text: number}`, `{...}` for a group."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, parts))
    if origin in (typing.Union, UnionType):
        return " | ".join(dict.fromkeys(map(_type_text, parts)))
    if origin is typing.Annotated:
        return _type_text(parts[0])
    if origin is dict:
        return f"{{{_type_text(parts[0])}: {_type_text(parts[1])}}}"
    if origin in (list, tuple, Sequence):
        is_open = origin is not tuple or parts[-1] is ...
        return f"[{_type_text(parts[0])}, ...]" if is_open else f"[{', '.join(map(_type_text, parts))}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{...}"
    return TYPE_NAMES.get(annotation, "value")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
