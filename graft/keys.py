"""Describe the keys of recipes: which values each takes, under which heading it stands, and what it means.

    a recipe class -> its keys under headings, then each group of keys once -> lines of --help, or Markdown tables

A key names its heading by its type (`epochs: ScheduleKey[int]`), and the type of a path says that it names an input
(Location, Checkpoint). The sentences are the docstrings under the fields.
"""

import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

T = TypeVar("T")


@dataclass(frozen=True)
class Heading:
    """The heading that a key stands under."""

    title: str


DataKey = Annotated[T, Heading("data")]
ModelKey = Annotated[T, Heading("model")]
ScheduleKey = Annotated[T, Heading("schedule")]
MachineKey = Annotated[T, Heading("machine")]
OutputKey = Annotated[T, Heading("output")]
HEADINGS = ("data", "model", "schedule", "machine", "output")


@dataclass(frozen=True)
class Named:
    """What a text names; `is_file` tells files that must exist from checkpoints, which may be hub ids."""

    values: str
    is_file: bool


Location = Annotated[str, Named("path", is_file=True)]
"""A file, folder, glob or URI that is read."""
StageFolder = Annotated[str, Named("folder", is_file=True)]
"""The output folder of a training stage."""
Checkpoint = Annotated[str, Named("folder or hub id", is_file=False)]
"""The folder or hub id of a model, or the name of one that comes with graft."""

TYPE_NAMES: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true | false", NoneType: "null"}
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|al|vs)\.$")


@dataclass(frozen=True)
class Key:
    """A key of a recipe, as people read it."""

    name: str
    heading: str | None
    values: str
    """The values that it takes, as `fp32 | bf16` or `integer of at least 1`."""
    default: str | None
    """Its default as YAML; None where the key is required, and "" for a group with the defaults of its own keys."""
    meaning: str


@dataclass(frozen=True)
class Input:
    """A text of a recipe that names a file or a checkpoint."""

    key: str
    value: str
    is_file: bool


@dataclass
class KeyGroup:
    """A recipe class, or a group of keys inside one."""

    model: type[BaseModel]
    holders: list[str] = field(default_factory=list)
    """The keys that hold it, as `data` or `sources[]`; none for the recipe itself."""

    @property
    def members(self) -> list[Key]:
        """The keys of the class, in its order."""
        return [_key(name, info) for name, info in self.model.model_fields.items()]


def key_groups(recipe_class: type[BaseModel]) -> list[KeyGroup]:
    """List a recipe class and the groups of keys inside it, each once."""
    groups = [KeyGroup(recipe_class)]
    for group in groups:  # the list grows while it is read
        prefix = f"{group.holders[0]}." if group.holders else ""
        for name, info in group.model.model_fields.items():
            for model, suffix in _nested_models(info.annotation).items():
                known = [one for one in groups if one.model is model]
                groups += [] if known else [KeyGroup(model)]
                (known or groups)[-1].holders.append(f"{prefix}{name}{suffix}")
    return groups


def by_heading(keys: Iterable[Key]) -> dict[str, list[Key]]:
    """Sort keys under their headings, of which the usual ones come first; a key without one is under "keys"."""
    found: dict[str, list[Key]] = {heading: [] for heading in HEADINGS}
    for key in keys:
        found.setdefault(key.heading or "keys", []).append(key)
    return {heading: members for heading, members in found.items() if members}


def help_lines(recipe_class: type[BaseModel], *, width: int) -> Iterator[str]:
    """Yield the lines that document the keys with one sentence each: those of the recipe, then each group of keys."""
    recipe, *groups = key_groups(recipe_class)
    for heading, keys in by_heading(recipe.members).items():
        yield from ["", f"{heading}:", *_key_lines(keys, "", width)]
    for group in groups:
        title = f"{', '.join(group.holders)}: {first_sentence(group.model.__doc__)}"
        yield from ["", *textwrap.wrap(title, width, subsequent_indent="  ")]
        yield from _key_lines(group.members, f"{group.holders[0]}.", width)


def markdown_tables(recipe_class: type[BaseModel], *, known: Mapping[type[BaseModel], str], level: int) -> str:
    """Write the keys as Markdown: a table for each heading, then one for each group of keys.

    `known` names the classes that the page describes elsewhere, and how it refers to them: their keys and groups are
    left out. `level` is that of the headings.
    """
    recipe, *groups = key_groups(recipe_class)
    inherited = [base for base in recipe_class.__mro__[1:] if base in known]
    keys = [key for key in recipe.members if not any(key in KeyGroup(base).members for base in inherited)]
    parts = [f"And the keys of {known[base]}." for base in inherited[:1]]
    for heading, members in by_heading(keys).items():
        parts.append(f"{'#' * level} {heading}\n\n{_table(members, '')}")
    own = {key.name for key in keys}
    for group in groups:
        named = [holder for holder in group.holders if re.split(r"[.\[]", holder)[0] in own]
        holders = ", ".join(f"`{holder}`" for holder in named)
        if not named:
            continue
        if group.model in known:
            parts.append(f"{holders}: see {known[group.model]}.")
        else:
            meaning = _one_line(group.model.__doc__)
            parts.append(f"{'#' * level} {holders}\n\n{meaning}\n\n{_table(group.members, '')}")
    return "\n\n".join(parts)


def values_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Write which values a type allows: `fp32 | bf16`, `integer of at least 1`, `[text, ...]`, `{...}` for a group."""
    return " | ".join(dict.fromkeys(_values(annotation, metadata)))


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a text, in one line."""
    words = _one_line(text)
    for end in re.finditer(r"\. ", words):
        sentence = words[: end.start() + 1]
        if not _ABBREVIATION.search(sentence):
            return sentence
    return words


def inputs_of(value: Any, annotation: Any = None, metadata: Sequence[Any] = (), key: str = "") -> Iterator[Input]:
    """Yield the texts in a recipe that name files or checkpoints, in the order of their keys."""
    if isinstance(value, BaseModel):
        for name, info in type(value).model_fields.items():
            yield from inputs_of(getattr(value, name), info.annotation, info.metadata, f"{key}.{name}".lstrip("."))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            for one in alternatives(annotation):
                if typing.get_origin(one) is dict:
                    yield from inputs_of(item, typing.get_args(one)[1], (), f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for one in filter(is_sequence, alternatives(annotation)):
            for item in value:
                yield from inputs_of(item, typing.get_args(one)[0], (), key)
    elif isinstance(value, str) and (named := _names(annotation, metadata)):
        yield Input(key, value, named.is_file)


def alternatives(annotation: Any) -> list[Any]:
    """List the members of a union, each without its annotations: `Location | list[str] | None` -> three."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, UnionType):
        return [member for part in parts for member in alternatives(part)]
    return alternatives(parts[0]) if origin is Annotated else [annotation]


def is_sequence(annotation: Any) -> bool:
    """Tell whether a type is that of a list."""
    return typing.get_origin(annotation) in (list, tuple, Sequence)


def is_group(annotation: Any) -> bool:
    """Tell whether a type is a recipe class or a dict."""
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return is_model or typing.get_origin(annotation) is dict


def _key(name: str, info: FieldInfo) -> Key:
    heading = next((one.title for one in info.metadata if isinstance(one, Heading)), None)
    default = info.get_default(call_default_factory=True, validated_data={})
    return Key(
        name, heading, values_text(info.annotation, info.metadata), _default_text(default), _one_line(info.description)
    )


def _default_text(default: Any) -> str | None:
    if default is PydanticUndefined:
        return None
    if isinstance(default, BaseModel):  # only what differs from the defaults that the group's own keys show
        fields = type(default).model_fields
        changed = {name: value for name, value in default if value != fields[name].get_default()}
        if not changed:
            return ""
        default = default.model_dump(mode="json", include=set(changed))
    return yaml.safe_dump(default, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _values(annotation: Any, metadata: Sequence[Any]) -> list[str]:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return [str(part).lower() if isinstance(part, bool) else str(part) for part in parts]
    if origin in (typing.Union, UnionType):
        return [text for part in parts for text in _values(part, () if part is NoneType else metadata)]
    if origin is Annotated:
        return _values(parts[0], [*metadata, *parts[1:]])
    if origin is dict:
        return [f"{{{values_text(parts[0])}: {values_text(parts[1])}}}"]
    if is_sequence(annotation):
        is_open = origin is not tuple or parts[-1] is ...
        return [f"[{values_text(parts[0])}, ...]" if is_open else f"[{', '.join(map(values_text, parts))}]"]
    if is_group(annotation):
        return ["{...}"]
    if annotation is str and (named := [one.values for one in metadata if isinstance(one, Named)]):
        return named
    if annotation in (int, float):
        return [f"{TYPE_NAMES[annotation]}{_limits(metadata)}"]
    return [TYPE_NAMES.get(annotation, "any value")]


def _names(annotation: Any, metadata: Sequence[Any]) -> Named | None:
    """Return what a text of this type names; None where it is any text."""
    if typing.get_origin(annotation) is Annotated:
        return _names(typing.get_args(annotation)[0], [*metadata, *typing.get_args(annotation)[1:]])
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return next(filter(None, (_names(part, metadata) for part in typing.get_args(annotation))), None)
    return next((one for one in metadata if isinstance(one, Named)), None) if annotation is str else None


def _limits(metadata: Sequence[Any]) -> str:
    """Write the limits of a number: ` of at least 1`, ` from 0 to 1`, ` over 0 and up to 1`."""
    limits = [one for whole in metadata for one in (whole.metadata if isinstance(whole, FieldInfo) else [whole])]
    least = next((one.ge for one in limits if isinstance(one, annotated_types.Ge)), None)
    most = next((one.le for one in limits if isinstance(one, annotated_types.Le)), None)
    over = next((one.gt for one in limits if isinstance(one, annotated_types.Gt)), None)
    under = next((one.lt for one in limits if isinstance(one, annotated_types.Lt)), None)
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}"
    low = f"of at least {least:g}" if least is not None else f"over {over:g}" if over is not None else ""
    high = f"of at most {most:g}" if most is not None else f"under {under:g}" if under is not None else ""
    return "".join(f" {text}" for text in (low, "and" if low and high else "", high) if text)


def _nested_models(annotation: Any) -> dict[type[BaseModel], str]:
    """Map each recipe class inside a type to the suffix of its key: .NAME in a dict, [] in a list, or none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation: ""}
    suffix = ".NAME" if typing.get_origin(annotation) is dict else "[]" if is_sequence(annotation) else ""
    found = dict[type[BaseModel], str]()
    for part in typing.get_args(annotation):
        for model, inner in _nested_models(part).items():
            found.setdefault(model, f"{suffix}{inner}")
    return found


def _key_lines(keys: Iterable[Key], prefix: str, width: int) -> Iterator[str]:
    indent = " " * 6
    for key in keys:
        default = f" = {key.default}" if key.default else ""
        required = ", required" if key.default is None else ""
        yield f"  {prefix}{key.name}{default} ({key.values}{required})"
        yield from textwrap.wrap(
            first_sentence(key.meaning), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


def _table(keys: Iterable[Key], prefix: str) -> str:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = "required" if key.default is None else f"`{key.default}`" if key.default else ""
        cells = (f"`{prefix}{key.name}`", f"`{key.values}`", default, key.meaning)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
