"""Write the model card of an exported graft as Markdown: what it is, its settings, training data and scores."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.errors import DataError

if TYPE_CHECKING:
    from graft.checkpoints.release import Pretrained

HEAD = """# {name}

The trained part of a graft: the projector between a Whisper encoder and a Qwen2-VL{adapters}.
It holds none of the weights of its bases. This command puts it onto them, whose tensors must have the digests in
pretrained.json (audio_base={audio_base}, text_base={text_base}):

    python -m jobs.build pretrained={name} out=FOLDER

pretrained= also takes this folder. recipes/ holds the recipes of its training, without the folders of the data."""


def model_card(
    name: str,
    pretrained: "Pretrained",
    energy_kept: Mapping[str, float],
    *,
    data_list: str | None,
    report: str | None,
) -> str:
    """Write the card as Markdown. Raises DataError when the data list or the report cannot be read."""
    settings = {
        **pretrained.settings,
        "instructions for a text style": ", ".join(pretrained.trained_styles) or "not trained",
        "lists of words": "trained" if pretrained.trained_context else "not trained",
    }
    adapters = ""
    if pretrained.adapters:
        adapters = f", and LoRA adapters of rank {pretrained.adapters.rank}"
        base = "as NF4 rounds it" if pretrained.onto == "nf4" else "as it is"
        mean, least = statistics.mean(energy_kept.values()), min(energy_kept.values())
        settings["adapters"] = f"rank {pretrained.adapters.rank}, for the text base {base}"
        settings["energy of the adapters kept"] = f"{mean:.1%} on average, {least:.1%} at least"
    settings["precision of the tensors"] = pretrained.dtype
    bases = {"audio_base": pretrained.audio_base, "text_base": pretrained.text_base}
    sections = [
        HEAD.format(name=name, adapters=adapters, **bases),
        "## Settings",
        _markdown_table([{"setting": key, "value": value} for key, value in settings.items()]),
        "## Training data",
        _training_data(data_list) if data_list else "Not listed.",
        "## Evaluation",
        _evaluation(report) if report else "Not scored.",
    ]
    return "\n\n".join(sections) + "\n"


def _training_data(path: str) -> str:
    """Quote a Markdown file, or lay out a JSON list of objects as a table."""
    if Path(path).suffix != ".json":
        return _read_text(path).strip()
    rows = _read_json(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"data_list {path} holds no list of objects: give one for each source of data, or Markdown")
    return _markdown_table(rows)


def _evaluation(path: str) -> str:
    """Quote the table of a report of jobs.evaluate as a code block."""
    from .scoring import table

    try:
        lines = table(_read_json(path)).splitlines()
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"report {path} is no report.json of jobs.evaluate ({error!r}): give one") from error
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _read_json(path: str) -> Any:
    try:
        return json.loads(_read_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): write it again") from error


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read ({error}): give a text file") from error


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay objects out as a Markdown table; the first one names the columns."""
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in cells)
