"""Describe the keys of a recipe for --help: defaults, allowed values and documentation, group by group."""

import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

TYPE_NAMES: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true | false", NoneType: "null"}


@dataclass
class KeyGroup:
    """A recipe class or a group inside it, the default values of its keys there, and the keys that hold it."""

    model: type[BaseModel]
    defaults: BaseModel | None
    holders: list[str]


def describe_keys(recipe_class: type[BaseModel], *, width: int) -> Iterator[str]:
    """Yield the lines that document each key: the recipe's own first, then one section for each nested group."""
    for group in _key_groups(recipe_class):
        prefix = f"{group.holders[0]}." if group.holders else ""
        if prefix:
            heading = f"{', '.join(group.holders)}: {_one_line(group.model.__doc__)}"
            yield from ["", *textwrap.wrap(heading, width, subsequent_indent="  ")]
        for name, field in group.model.model_fields.items():
            yield f"  {prefix}{name}{_value_text(field, _default(group, name, field))}"
            indent = " " * 6
            yield from textwrap.wrap(
                _one_line(field.description), width, initial_indent=indent, subsequent_indent=indent
            )


def _key_groups(recipe_class: type[BaseModel]) -> list[KeyGroup]:
    """List a recipe class and the groups inside it, each once though several keys hold it with the same defaults."""
    groups = [KeyGroup(recipe_class, None, [])]
    for group in groups:  # the list grows while it is read
        prefix = f"{group.holders[0]}." if group.holders else ""
        for name, field in group.model.model_fields.items():
            for model, suffix in _nested_models(field.annotation).items():
                default = _default(group, name, field)
                defaults = default if isinstance(default, model) else None
                known = [other for other in groups if other.model is model and other.defaults == defaults]
                groups += [] if known else [KeyGroup(model, defaults, [])]
                (known or groups)[-1].holders.append(f"{prefix}{name}{suffix}")
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


def _default(group: KeyGroup, name: str, field: FieldInfo) -> Any:
    """Return the default of a key in its group; pydantic's undefined value where the key is required."""
    if group.defaults is not None:
        return getattr(group.defaults, name)
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
