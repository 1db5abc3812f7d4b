"""Write the page and the files beside it.

evaluation -> sections of the page, clips as JSON -> templates -> report.html; exports/
"""

import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from graft.errors import GraftError, MissingExtra, require
from graft.storage.atomic import write_atomic

from .audio import CLIPS_FILE, embed_audio, read_clips
from .clips import audited, clip_rows, most_errors_first, telling
from .evaluation import Evaluation, read_evaluation
from .exports import write_exports
from .plots import curves_plot, histogram_plot
from .sections import data_rows, head_section, notes_of, plots_of, rate_rows, sound_rows
from .settings import PageSettings

PAGE_FILE, EXPORTS_FOLDER, AUDIO_FOLDER = "report.html", "exports", "audio"
EXTRA = "report"


def write_report(
    evaluation: Evaluation, out: Path, settings: PageSettings, runs: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write report.html and exports/ into a folder; returns the path of the page.

    `runs` are the stages that led to the model, as training_runs.training_runs describes them. The same evaluation
    gives the same bytes. Raises MissingExtra.
    """
    require("jinja2", extra=EXTRA)  # before the work
    require("matplotlib", extra=EXTRA)
    rows = clip_rows(evaluation.sets)
    system = evaluation.systems[0] if evaluation.systems else ""
    audit = audited(rows, system)[: settings.audit_clips]
    listed = most_errors_first(rows)[: settings.clips]
    has_audio = evaluation.folder is not None and (evaluation.folder / CLIPS_FILE).is_file()
    chosen = telling(rows, system, settings.audio_clips) if has_audio else []
    shown = {row.key: row for row in [*listed, *audit, *chosen]}
    places = {key: place for place, key in enumerate(shown)}
    data: dict[str, Any] = {
        "systems": list(evaluation.systems),
        "sets": [one.name for one in evaluation.sets],
        "clips": [row.to_json() for row in shown.values()],
        "audit": [places[row.key] for row in audit],
        "all_clips": len(rows),
    }
    audio: list[dict[str, str]] = []
    files: dict[Any, str] = {}  # of the same audio in exports/, for NeMo's manifest
    shutil.rmtree(out / EXPORTS_FOLDER / AUDIO_FOLDER, ignore_errors=True)
    for key, clip in read_clips(evaluation.folder, [row.key for row in chosen]) if evaluation.folder else ():
        data["clips"][places[key]]["audio"] = len(audio)
        audio.append(embed_audio(clip))
        files[key] = f"{AUDIO_FOLDER}/{len(files):04}.mp3"
        write_atomic(out / EXPORTS_FOLDER / files[key], base64.b64decode(audio[-1]["audio"]))
    write_exports(rows, evaluation.systems, out / EXPORTS_FOLDER, files)
    scores = evaluation.scores
    contents = {
        "head": head_section(evaluation),
        "rates": rate_rows(evaluation.scores),
        "sounds": sound_rows(evaluation.scores),
        "notes": notes_of(evaluation.scores, system),
        "plots": plots_of(evaluation),
        "checks": (scores.get("honesty") or {"checks": []})["checks"],
        "vision": scores.get("vision"),
        "tokens": scores.get("tokens") or [],
        "data_rows": data_rows(scores.get("data") or {}),
        "lengths": histogram_plot(scores["data"]) if scores.get("data") else None,
        "runs": [dict(run) | {"plot": curves_plot(run)} for run in runs],
        "audit_count": len(audit),
        "audio": [_json_for_html(one) for one in audio],
        "recipe": evaluation.recipe,
        "clip_count": len(rows),
        "listed_count": len(shown),
    }
    path = out / PAGE_FILE
    write_atomic(path, render(contents, data))
    return path


def write_page_of(folder: Path) -> None:
    """Write the page of a folder of graft evaluate, and print where it is; or what it takes, where that is missing."""
    try:
        evaluation = read_evaluation(folder)
        page = write_report(evaluation, folder, PageSettings(), runs_of(evaluation))
    except MissingExtra as error:
        print(f"report: there is no page, because {error}", flush=True)
    else:
        print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB) opens in any browser", flush=True)


def runs_of(evaluation: Evaluation, folders: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Describe stages by their output folders, or those that led to the model of an evaluation.

    Where their files cannot be read, a line says so, and there are none.
    """
    from ..training_runs import describe_run, training_runs

    model = evaluation.scores.get("model") if evaluation.folder else None
    try:
        if folders is not None:
            return [describe_run(Path(folder)) for folder in folders]
        return training_runs(model) if isinstance(model, str) else []
    except (GraftError, OSError, ValueError) as error:
        print(f"report: the training is left out: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return []


def render(contents: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Fill the templates: `contents` are the sections, `data` what the page's script reads.

    All texts are escaped, and the page's policy allows no script but its own and nothing from any network.
    """
    jinja2, markup = require("jinja2", extra=EXTRA), require("markupsafe", extra=EXTRA).Markup
    folder = files(__package__) / "templates"
    script, style = ((folder / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent}
    environment.filters["ours"] = markup  # of what needs no escapes: plots, and JSON that was escaped
    page = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"data": _json_for_html(data), "script": script, "style": style}
    ours = {name: markup(part) for name, part in parts.items()}  # which need no escapes
    return str(page.render(**contents, **ours, script_digest=digest))


def _json_for_html(data: Any) -> str:
    """Write JSON that may stand in an element script: no text in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"
