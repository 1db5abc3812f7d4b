"""The README.md beside a trained part: what it is, how it hears, what it was trained on, how well it does."""

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graft.errors import DataError


def card(name: str, pretrained: Any, kept: Mapping[str, float], *, data_list: str | None, report: str | None) -> str:
    """Write the card of a graft.checkpoints.release.Pretrained, Markdown. Raises DataError where a file that it is to quote can't be read."""
    sections = [_head(name, pretrained), "## Settings\n\n" + "\n".join(_settings(pretrained, kept))]
    sections.append(f"## Training data\n\n{_data(data_list) if data_list else 'Not listed.'}")
    sections.append(f"## Evaluation\n\n{_evaluation(report) if report else 'Not scored.'}")
    return "\n\n".join(sections) + "\n"


def _head(name: str, pretrained: Any) -> str:
    adapters = f", and LoRA adapters of rank {pretrained.adapters.rank}" if pretrained.adapters else ""
    return f"""# {name}

The trained part of a graft: the projector between a Whisper encoder and a Qwen2-VL{adapters}.
None of the bases' weights are here. This puts it onto them (audio_base={pretrained.audio_base}, text_base={pretrained.text_base}), whose
tensors must have the digests in pretrained.json:

    python -m jobs.build pretrained={name} out=FOLDER

pretrained= also takes this folder; recipes/ holds what it was trained with, the data's own folders left out."""


def _settings(pretrained: Any, kept: Mapping[str, float]) -> Iterator[str]:
    yield from _table({"setting": key, "value": value} for key, value in _values(pretrained, kept))


def _values(pretrained: Any, kept: Mapping[str, float]) -> Iterator[tuple[str, Any]]:
    yield from pretrained.settings.items()
    yield "instructions for a text style", ", ".join(pretrained.trained_styles) or "not trained"
    yield "lists of words", "trained" if pretrained.trained_context else "not trained"
    if pretrained.adapters:
        yield (
            "adapters",
            f"rank {pretrained.adapters.rank}, for the text base {'as NF4 rounds it' if pretrained.onto == 'nf4' else 'as it is'}",
        )
        yield "their energy kept", f"{statistics.mean(kept.values()):.1%} on average, {min(kept.values()):.1%} at least"
    yield "tensors", pretrained.dtype


def _data(path: str) -> str:
    text = _read(path)
    if Path(path).suffix != ".json":
        return text.strip()
    rows = _parsed(path, text)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"data_list {path} holds no list of objects: give one for each source of data, or Markdown")
    return "\n".join(_table(rows))


def _evaluation(path: str) -> str:
    from .scoring import table

    report = _parsed(path, _read(path))
    try:
        lines = table(report).splitlines()
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"report {path} is no report.json of jobs.evaluate ({error!r}): give one") from error
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read ({error}): give a text file") from error


def _parsed(path: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): write it again") from error


def _table(rows: Any) -> Iterator[str]:
    """A Markdown table of objects; the first one names the columns."""
    rows = list(rows)
    columns = list(rows[0])
    for cells in (columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)):
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
