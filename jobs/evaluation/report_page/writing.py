"""Write the page and the files beside it.

evaluation -> sections of the page, clips as JSON -> templates -> report.html; exports/
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from graft.errors import require
from graft.storage.atomic import write_atomic

from .clips import audited, clip_rows, most_errors_first
from .evaluation import Evaluation
from .exports import write_exports
from .sections import head_section, notes_of, rate_rows, sound_rows
from .settings import PageSettings

PAGE_FILE, EXPORTS_FOLDER = "report.html", "exports"
EXTRA = "report"


def write_report(evaluation: Evaluation, out: Path, settings: PageSettings) -> Path:
    """Write report.html and exports/ into a folder; returns the path of the page.

    The same evaluation gives the same bytes. Raises MissingExtra.
    """
    require("jinja2", extra=EXTRA)  # before the work
    rows = clip_rows(evaluation.sets)
    write_exports(rows, evaluation.systems, out / EXPORTS_FOLDER, {})
    system = evaluation.systems[0] if evaluation.systems else ""
    audit = audited(rows, system)[: settings.audit_clips]
    listed = most_errors_first(rows)[: settings.clips]
    shown = {row.key: row for row in [*listed, *audit]}
    places = {key: place for place, key in enumerate(shown)}
    data = {
        "systems": list(evaluation.systems),
        "sets": [one.name for one in evaluation.sets],
        "clips": [row.to_json() for row in shown.values()],
        "audit": [places[row.key] for row in audit],
        "all_clips": len(rows),
    }
    contents = {
        "head": head_section(evaluation),
        "rates": rate_rows(evaluation.scores),
        "sounds": sound_rows(evaluation.scores),
        "notes": notes_of(evaluation.scores, system),
        "recipe": evaluation.recipe,
        "clip_count": len(rows),
        "listed_count": len(shown),
    }
    path = out / PAGE_FILE
    write_atomic(path, render(contents, data))
    return path


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
