"""The command line that every job shares: `python -m jobs.VERB --recipe FILE key=value ... [--plan] [--debug]`.

`--key=value` and `--key value` mean key=value, and `--some-key` some_key=true where that is yes or no.

argv -> recipe -> the job's main, or its plan -> exit code. What a user can mend (GraftError, also from inside Ray's workers) ends as one
line on stderr and exit code 2; anything else is a bug and keeps its traceback.
"""

import argparse
import importlib.metadata
import json
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, TypeVar

from pydantic import BaseModel, Field, create_model
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from graft.config import Recipe, models_in, read_recipe
from graft.errors import GraftError, RecipeError

from .console import quiet_libraries

R = TypeVar("R", bound=Recipe)

STOPPED = 128 + signal.SIGTERM
"""Exit code of a job that was stopped and saved first."""

# Where Ray and Ray Train keep the error that they wrap.
_INNER_ERRORS = (
    "cause",
    "_base_exc",
    "training_failed_error",
    "controller_failure",
    "health_check_failure",
    "__cause__",
)
_GRAFT_ERROR_LINE = re.compile(r"^graft\.errors\.\w+: (.+)$", re.MULTILINE)


class PlanOptions(Recipe):
    """What --plan is told besides the recipe."""

    device: str = "h200"
    """A GPU, such as h200, h100, a100, l40s or 4090."""
    price: float | None = Field(default=None, ge=0)
    """Of one hour on one device."""
    share: float = Field(default=0.45, gt=0, le=1)
    """Of the device's peak that training is expected to reach."""
    hours: float = Field(default=100.0, gt=0)
    """Of speech, where data= is not given."""
    clip_s: float = Field(default=10.0, ge=0.1, le=30)
    """Mean length of a clip in seconds, where data= is not given."""


def run_job(
    recipe_class: type[R],
    main: Callable[[R], int | None],
    *,
    summary: str | None,
    argv: Sequence[str] | None = None,
    plan: Callable[[R, PlanOptions], None] | None = None,
) -> int:
    """Read the recipe that the command line names and run `main` on it, or `plan` where --plan is given; returns the exit code.

    0 or what `main` returns; 2 after a GraftError, printed as one line; 130 after Ctrl-C. Other exceptions pass through. Of what the recipe
    requires, a plan still requires `model` alone: the rest may be None.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        options, overrides = _read_arguments(recipe_class, summary, argv, plans=plan is not None)
        quiet_libraries()
        if plan and (plan_options := _plan_options(options)):
            plan(read_recipe(_with_model_alone(recipe_class), options.recipe, overrides), plan_options)
            return 0
        return main(read_recipe(recipe_class, options.recipe, overrides)) or 0
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
    """What to tell the user about an error that they can mend, found through Ray's wrappers; None when it is a bug."""
    chain = list(_unwrapped(error))
    for inner in chain:
        # A RayTaskError(DataError) is a DataError too, but its own text is a traceback; what it wraps comes later in the chain.
        if isinstance(inner, GraftError) and not isinstance(getattr(inner, "cause", None), BaseException):
            return str(inner)
    for inner in chain:
        if isinstance(inner, ModuleNotFoundError) and (extra := _extra_of(inner.name or "")):
            return f"{inner.name} is not installed: pip install 'graft{extra}'"
    # Ray Data and dying actors send only the traceback's text across processes.
    lines = [
        line
        for inner in chain
        if inner.__class__.__module__.startswith("ray.")
        for line in _GRAFT_ERROR_LINE.findall(str(inner))
    ]
    return lines[-1] if lines else None


def _unwrapped(error: BaseException) -> Iterator[BaseException]:
    """The error and the errors inside it, outermost first, each once."""
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


def _extra_of(module: str) -> str | None:
    """The extra of graft that installs a package: "ray" -> "[jobs]"; "" for a core dependency, None for what graft does not ask for."""
    try:
        requirements = importlib.metadata.requires("graft") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source folder
        return None
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        if name and name[0].replace("-", "_").lower() == module.lower():
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
            return f"[{extra[1]}]" if extra else ""
    return None


def _read_arguments(
    recipe_class: type[Recipe], summary: str | None, argv: Sequence[str], *, plans: bool
) -> tuple[argparse.Namespace, list[str]]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    usage = f"python -m {spec.name if spec else 'jobs.VERB'} [--recipe FILE] [key=value ...] {'[--plan ...] ' if plans else ''}[--debug]"
    parser = argparse.ArgumentParser(
        usage=usage,
        description=summary,
        epilog="\n".join(
            [
                "recipe keys, as key=value, --key=value or --key value (--key alone for True):",
                *_documented(recipe_class),
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--recipe", metavar="FILE", help="YAML file with the recipe's keys; key=value (or key.sub=value) wins over it"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if plans:
        parser.add_argument(
            "--plan", action="store_true", help="print memory, steps, hours and cost of the run and start nothing"
        )
        for name, field in PlanOptions.model_fields.items():
            default = "" if field.default is None else f" (default {field.default})"
            parser.add_argument(f"--{name}", metavar="...", help=f"with --plan: {field.description}{default}")
    try:
        options, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise RecipeError(f"{error}: see --help") from error
    switches = {name for name, field in recipe_class.model_fields.items() if field.annotation is bool}
    return options, list(_overrides(overrides, switches))


def _overrides(arguments: Sequence[str], switches: Set[str]) -> Iterator[str]:
    """What argparse left over, each as key=value."""
    left = iter(arguments)
    for argument in left:
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
        yield override


def _plan_options(options: argparse.Namespace) -> PlanOptions | None:
    """What --plan was told; None where it was not given."""
    given = {name: value for name in PlanOptions.model_fields if (value := getattr(options, name)) is not None}
    if given and not options.plan:
        raise RecipeError(f"argument --{next(iter(given))} goes with --plan: see --help")
    return (
        read_recipe(PlanOptions, None, [f"{name}={json.dumps(value)}" for name, value in given.items()])
        if options.plan
        else None
    )


def _with_model_alone(recipe_class: type[R]) -> type[R]:
    """A recipe class that requires `model` alone; what else the given one requires is None by default."""
    required = {
        name: field.annotation
        for name, field in recipe_class.model_fields.items()
        if field.is_required() and name != "model"
    }
    optional: dict[str, Any] = {
        name: (annotation | None, None) for name, annotation in required.items() if annotation is not None
    }
    return create_model(recipe_class.__name__, __base__=recipe_class, **optional)


def _documented(recipe_class: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One line a field, `key = default   what it is`; a group's fields follow with their dotted keys."""
    for name, field in recipe_class.model_fields.items():
        key, groups = f"{prefix}{name}", models_in(field.annotation)
        default = "(required)" if field.is_required() else f"= {_default(field)}"
        docs = " ".join((field.description or "").split())
        yield f"  {key} {default}{f'  # {docs}' if docs else ''}"
        for group in groups:
            yield from _documented(group, f"{key}.")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    return "..." if value is PydanticUndefined or isinstance(value, BaseModel) else repr(value)
