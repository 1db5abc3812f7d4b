"""Read recipes, the settings of jobs.

    YAML file -> `key.sub=value` overrides -> one frozen, fully checked pydantic model

An unknown key or a wrong value raises RecipeError, which names every fault at once, in one line.
"""

import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from graft.errors import RecipeError


class Recipe(BaseModel):
    """The base class of every job's recipe and of the groups inside it; a docstring under a field documents it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )


R = TypeVar("R", bound=Recipe)


def read_recipe(cls: type[R], path: str | None, overrides: Sequence[str] = ()) -> R:
    """Read a recipe from a YAML file, or with None its defaults, and apply `key.sub=value` overrides.

    Override values are YAML: `lr=1e-3`, `sources=[a.jsonl, b.jsonl]`, `speaker=` (null). A list is replaced as a whole.
    A group that is given in part keeps the other defaults of its place in the recipe. Raises RecipeError for a missing
    or malformed file, an override without `=`, unknown keys and wrong values.
    """
    data = _read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply(data, override)
    defaults = {
        name: field.get_default(call_default_factory=True, validated_data={})
        for name, field in cls.model_fields.items()
    }
    try:
        return cls.model_validate(_with_defaults(cls, defaults, data))
    except ValidationError as error:
        faults = dict.fromkeys(_describe_fault(cls, detail) for detail in error.errors(include_url=False))
        where = f"recipe {path}" if path is not None else "recipe"
        raise RecipeError(f"{where}: {'; '.join(faults)}") from error


def recipe_yaml(recipe: Recipe) -> str:
    """Write the resolved recipe as YAML, with every field, in the order of the class."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=1000)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """List the pydantic models inside an annotation: `Lora | None` -> [Lora], `dict[str, list[Source]]` -> [Source]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not readable: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: not YAML: {_one_line(error)}") from error
    if not isinstance(data, dict | None):
        raise RecipeError(f"recipe {path}: holds a {type(data).__name__}, wants `key: value` lines")
    return data or {}


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"override {override!r} is not of the form key=value or key.sub=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"override {override!r}: the value is not YAML (put it in quotes): {_one_line(error)}"
        ) from error
    *groups, name = key.split(".")
    for depth, group in enumerate(groups, start=1):
        if data.get(group) is None:
            data[group] = {}
        data = data[group]
        if not isinstance(data, dict):
            raise RecipeError(
                f"override {override!r}: {'.'.join(groups[:depth])} is {data!r:.60}, not a group: give it as a whole"
            )
    data[name] = value


def _with_defaults(cls: type[BaseModel], defaults: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a partly given group from the default of its place in `cls`, which may differ from the group's own."""
    filled = dict(data)
    for name, given in data.items():
        default = defaults.get(name)
        if (
            isinstance(given, Mapping)
            and isinstance(default, BaseModel)
            and models_in(cls.model_fields[name].annotation) == [type(default)]
        ):
            group = dict(default)
            filled[name] = {**group, **_with_defaults(type(default), group, given)}
    return filled


def _describe_fault(cls: type[BaseModel], detail: ErrorDetails) -> str:
    key = ".".join(map(str, detail["loc"]))
    given = repr(detail["input"])
    value = f"{key}={given if len(given) <= 80 else f'{given[:77]}...'}" if key else "values"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(cls, detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {value} ({hint}known here: {', '.join(known)})"
    if detail["type"] == "missing":
        return f"key {key} is required"
    if detail["type"] == "value_error":
        return f"{value}: {detail['ctx']['error']}"
    is_unquoted = detail["type"] == "string_type" and isinstance(detail["input"], bool | int | float)
    hint = " (put it in quotes)" if is_unquoted else ""
    return f"{value}: {detail['msg'][:1].lower()}{detail['msg'][1:]}{hint}"


def _known_keys(cls: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    models = [cls]
    for step in loc:  # Steps that name no field are list indices, dict keys and union tags.
        fields = [model.model_fields[str(step)] for model in models if step in model.model_fields]
        models = [model for field in fields for model in models_in(field.annotation)] or models
    return sorted({name for model in models for name in model.model_fields})


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
