"""Read recipes, the settings of jobs.

    YAML file -> `key.sub=value` overrides, taken as typed -> one frozen, fully checked pydantic model

The type of a key decides how the value of an override is read:

    text             as it is typed: `audio=call #1.wav`, `audio=*.mp3`, `audio=2024-05-01`
    number, choice   by its type: `learning_rate=1e-3`, `gpu=true`, `dtype=bf16`
    list             one value, or several between commas: `formats=txt,srt`. Values with a comma in them stand in
                     brackets and quotes: `audio=["Smith, John.wav"]`
    group, dict      `{key: value}` as YAML, or `key.sub=value`

`key=` and `key=null` give a key no value where it may have none. Of a key that is given twice, the last value counts.
A file, brackets and braces hold YAML. An unknown key or a wrong value raises RecipeError, which names every fault at
once, in one line.
"""

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from graft.errors import RecipeError
from graft.keys import alternatives, is_group, is_sequence, values_text
from graft.redaction import without_secrets

SCALAR_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}
"""YAML's tags of values that are read as such where a key takes any value; others, such as dates, are text."""
ARTICLES = {"integer": "an ", "number": "a ", "path": "a ", "folder": "a "}
QUOTES = """put values with signs in quotes, as in ["a, b.wav", "*.mp3"]"""


class Recipe(BaseModel):
    """The base class of every job's recipe and of the groups inside it; a docstring under a field documents it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )


R = TypeVar("R", bound=Recipe)


def read_recipe(cls: type[R], path: str | None, overrides: Sequence[str] = ()) -> R:
    """Read a recipe from a YAML file, or with None its defaults, and apply `key.sub=value` overrides.

    Overrides are read as this file says above. A list is replaced as a whole. A group that is given in part keeps the
    other defaults of its place in the recipe. Raises RecipeError for a missing or malformed file, an override without
    `=`, unknown keys and wrong values.
    """
    data = _read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply(cls, data, override)
    return make_recipe(cls, data, name=f"recipe {path}" if path is not None else "arguments")


def make_recipe(cls: type[R], data: Mapping[str, Any], *, name: str = "recipe") -> R:
    """Make a recipe of values, as read_recipe does; `name` begins its errors."""
    defaults = {
        key: field.get_default(call_default_factory=True, validated_data={}) for key, field in cls.model_fields.items()
    }
    try:
        return cls.model_validate(_with_defaults(cls, defaults, data))
    except ValidationError as error:
        raise RecipeError(f"{name}: {'; '.join(_describe_faults(cls, error))}") from error


def recipe_yaml(recipe: Recipe) -> str:
    """Write the resolved recipe as YAML, with every field, in the order of the class, and without secrets of URIs."""
    return yaml.safe_dump(recipe_values(recipe), sort_keys=False, allow_unicode=True, width=1000)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Return the values of the resolved recipe as they are kept: the URIs in them have no secrets."""
    values: dict[str, Any] = without_secrets(recipe.model_dump(mode="json"))
    return values


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """List the pydantic models inside an annotation: `Lora | None` -> [Lora], `dict[str, list[Source]]` -> [Source]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def recipe_schema(cls: type[Recipe]) -> dict[str, Any]:
    """Make the JSON schema of a command's recipe files, which may leave required keys to the command line."""
    schema = cls.model_json_schema()
    schema.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


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


# Overrides

Slot = tuple[Any, Sequence[Any]]
"""The type of a value, and what a field says of it besides, such as the limits of a number."""


def _apply(cls: type[BaseModel], data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"override {override!r} is not of the form key=value or key.sub=value")
    *groups, name = key.split(".")
    slots: list[Slot] = [(cls, ())]
    for depth, group in enumerate(groups, start=1):
        slots = _inside(slots, group)
        if data.get(group) is None:
            data[group] = {}
        data = data[group]
        if not isinstance(data, dict):
            raise RecipeError(
                f"override {override!r}: {'.'.join(groups[:depth])} is {data!r:.60}, not a group: give it as a whole"
            )
    data[name] = _read_value(_inside(slots, name), text, key)


def _inside(slots: Sequence[Slot], step: str | int) -> list[Slot]:
    """List what may stand at a key or an index of values of these types; nothing where there is no such place."""
    found: list[Slot] = []
    for one in _types(slots):
        parts = typing.get_args(one)
        if is_sequence(one) and isinstance(step, int):
            is_fixed = typing.get_origin(one) is tuple and parts[-1] is not ...
            found.append((parts[min(step, len(parts) - 1)] if is_fixed else parts[0], ()))
        elif typing.get_origin(one) is dict and isinstance(step, str):
            found.append((parts[1], ()))
        elif step in getattr(one, "model_fields", ()):
            found.append((one.model_fields[step].annotation, one.model_fields[step].metadata))
    return found


def _types(slots: Sequence[Slot]) -> list[Any]:
    return [one for annotation, _ in slots for one in alternatives(annotation)]


def _read_value(slots: Sequence[Slot], text: str, key: str) -> Any:
    """Read the value of an override by the types that its key takes."""
    types, bare = _types(slots), text.strip()
    if NoneType in types and bare in ("", "null"):
        return None
    if not bare and types:
        raise RecipeError(f"{key}= has no value: give {_allowed(slots)}")
    takes_list, takes_group = any(map(is_sequence, types)), any(map(is_group, types))
    is_free = not types or Any in types
    if ((takes_list or is_free) and _is_between(bare, "[]")) or ((takes_group or is_free) and _is_between(bare, "{}")):
        return _read_brackets(slots, bare, key)
    if takes_list and _is_between(bare, "{}") and any(map(is_group, _types(_inside(slots, 0)))):
        return [_read_brackets(_inside(slots, 0), bare, key)]
    scalars = [one for one in types if one is not NoneType and not is_sequence(one) and not is_group(one)]
    if takes_list and ("," in text or not scalars):
        items = [item.strip() for item in text.split(",")]
        if not all(items):
            raise RecipeError(f"{key}={text} has an empty part between its commas: leave it out")
        return [_read_scalar(_inside(slots, index), item) for index, item in enumerate(items)]
    return _read_scalar(slots, text)


def _read_brackets(slots: Sequence[Slot], text: str, key: str) -> Any:
    """Read YAML in brackets or braces, whose texts are taken as they are written there."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem = _one_line(getattr(error, "problem", None) or error)
        raise RecipeError(f"{key}={text} is not YAML ({problem}): {QUOTES}") from error
    return _read_node(slots, node)


def _read_node(slots: Sequence[Slot], node: yaml.Node | None) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(_inside(slots, index), item) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return {key.value: _read_node(_inside(slots, key.value), value) for key, value in node.value}
    if not isinstance(node, yaml.ScalarNode):
        return None
    is_quoted = node.style in ("'", '"')
    if not is_quoted and NoneType in _types(slots) and node.value in ("", "null", "~"):
        return None
    return node.value if is_quoted else _read_scalar(slots, node.value)


def _read_scalar(slots: Sequence[Slot], text: str) -> Any:
    """Read one value: a choice that is no text, or any value; the rest is text, in which pydantic reads numbers."""
    types = _types(slots)
    if not types or Any in types:
        tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
        return yaml.safe_load(text) if tag in SCALAR_TAGS else text
    choices = [option for one in types if typing.get_origin(one) is typing.Literal for option in typing.get_args(one)]
    return next((option for option in choices if str(option) == text), text)


def _is_between(text: str, signs: str) -> bool:
    return text.startswith(signs[0]) and text.endswith(signs[1])


# Defaults and faults


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


def _describe_faults(cls: type[BaseModel], error: ValidationError) -> Iterator[str]:
    """Describe each fault once. Of a value that no member of a union takes, the faults that lie deepest count."""
    details = error.errors(include_url=False)
    places = [_place(cls, detail) for detail in details]
    faults = dict[str, None]()
    for detail, place in zip(details, places, strict=True):
        if not any(other[: len(place)] == place and len(other) > len(place) for other in places):
            faults[_describe_fault(cls, detail, place)] = None
    yield from faults


def _place(cls: type[BaseModel], detail: ErrorDetails) -> tuple[str | int, ...]:
    """Return the keys and indices of a fault's location, without the names of a union's members."""
    place: list[str | int] = []
    slots: list[Slot] = [(cls, ())]
    for step in detail["loc"]:
        inner = _inside(slots, step)
        # "list[str]", "[key]" and, beside a dict, "str" name a type, not a key.
        is_member = isinstance(step, str) and ("[" in step or step in _class_names(slots))
        if (inner or (detail["type"] == "extra_forbidden" and step == detail["loc"][-1])) and not is_member:
            place.append(step)
            slots = inner
    return tuple(place)


def _class_names(slots: Sequence[Slot]) -> set[str]:
    return {one.__name__ for one in _types(slots) if isinstance(one, type)}


def _describe_fault(cls: type[BaseModel], detail: ErrorDetails, place: Sequence[str | int]) -> str:
    key, given = ".".join(map(str, place)), _shown(detail["input"])
    value = f"{key}={given if len(given) <= 80 else f'{given[:77]}...'}"
    slots: list[Slot] = [(cls, ())]
    outer = slots
    for step in place:
        outer, slots = slots, _inside(slots, step)
    if detail["type"] == "extra_forbidden":
        known = sorted({name for one in _types(outer) for name in getattr(one, "model_fields", ())})
        close = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}? --help lists all" if close else f"known here: {', '.join(known)}"
        return f"unknown key {value} ({hint})"
    if detail["type"] == "missing":
        return f"key {key} is required ({_allowed(slots)})"
    if detail["type"] == "value_error":
        return f"{value}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
    said = f"{detail['msg'][:1].lower()}{detail['msg'][1:]}"
    if detail["loc"][-1] == "[key]":
        names = [(typing.get_args(one)[0], ()) for one in _types(outer) if typing.get_origin(one) is dict]
        is_choice = detail["type"] == "literal_error"
        return f"unknown key {key} (known here: {_allowed(names)})" if is_choice else f"key {key}: {said}"
    types = [one for one in _types(slots) if one is not NoneType]
    if isinstance(detail["input"], str) and types and all(map(is_group, types)):
        name = "KEY" if hasattr(types[0], "model_fields") else "NAME"
        return f"{value}: give {key}.{name}=value or {key}={{{name}: value}}"
    is_unquoted = detail["type"] == "string_type" and isinstance(detail["input"], bool | int | float)
    hint = " in quotes" if is_unquoted else ""
    if slots and not detail["type"].startswith(("string_pattern", "string_too", "too_")):
        return f"{value}: give {_allowed(slots)}{hint}"
    return f"{value}: {said}"


def _allowed(slots: Sequence[Slot]) -> str:
    """Write which values are allowed, for a message: `a, b or null`."""
    texts = dict.fromkeys(text for slot in slots for text in values_text(*slot).split(" | "))
    *others, last = (f"{ARTICLES.get(text.split()[0], '')}{text}" for text in texts)
    return f"{', '.join(others)} or {last}" if others else last


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
