"""Run commands in this process, and read what they leave."""

import json
from pathlib import Path
from typing import Any

from jobs.transcribe import main


def transcribe(*arguments: str) -> int:
    """Run `graft transcribe` with arguments; returns the exit code."""
    return main(argv=list(arguments))


def left_by_evaluate(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the report of `graft evaluate`, and each clip of predictions.jsonl with the texts of all systems by name.

    The scores of the report are those that `graft score` gives for predictions.jsonl.
    """
    from jobs.score import ScoreRecipe, score

    names = {"report.json", "predictions.jsonl", "recipe.yaml", "clips.parquet", "systems.json"}
    assert {path.name for path in out.iterdir()} - {"checks.jsonl", "report.html", "exports"} == names
    report = json.loads((out / "report.json").read_text())
    again = score(ScoreRecipe(files=[str(out / "predictions.jsonl")]))
    assert {key: report[key] for key in again} == again
    clips: dict[tuple[str, str], dict[str, Any]] = {}
    for line in map(json.loads, (out / "predictions.jsonl").open()):
        key = line["set"], line["id"]
        clip = clips.setdefault(key, {"audio_id": line["id"]} | line | {"text": line["reference"]})
        clip[line["system"]] = line.get("hypothesis")
    return report, list(clips.values())
