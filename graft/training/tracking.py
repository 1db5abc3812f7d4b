"""Record a run's metrics and sample transcripts as JSON lines, draw its curves, and log to Weights & Biases if asked.

metrics.jsonl has one line of StepLog's fields for each log, and one of {step, validation_loss, ...} for each
validation, where `validation_loss/NAME` is that of the validation set NAME.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from graft.config import Recipe
from graft.errors import require
from graft.storage.atomic import write_atomic

METRICS_FILE = "metrics.jsonl"
TRANSCRIPTS_FILE = "transcripts.jsonl"


class WandbRecipe(Recipe):
    """Log the run to Weights & Biases."""

    project: str = "graft"
    """Name of the W&B project."""
    name: str | None = None
    """Name of the W&B run; by default the name of the output folder."""
    mode: Literal["online", "offline"] = "online"
    """`online` sends metrics at once; `offline` writes them into the output folder for a later `wandb sync`."""


class Tracker:
    """Appends metrics and transcripts to files, and logs them to W&B where the recipe has a `wandb` group.

    Lines after step `from_step` are removed first, because a resumed run writes them again. Raises MissingExtra where
    W&B is not installed.
    """

    def __init__(self, folder: str | Path, recipe: Mapping[str, Any], *, from_step: int):
        self.folder = Path(folder)
        for name in (METRICS_FILE, TRANSCRIPTS_FILE):
            path = self.folder / name
            if path.is_file():
                write_atomic(
                    path, "".join(json.dumps(line) + "\n" for line in _read_lines(path) if line["step"] <= from_step)
                )
        self._run = _wandb_run(self.folder, recipe) if recipe.get("wandb") else None

    def write(self, values: Mapping[str, Any]) -> None:
        """Append the metrics of step `values["step"]`."""
        _append(self.folder / METRICS_FILE, [values])
        if self._run:
            self._run.log(
                {name: value for name, value in values.items() if value is not None and name != "step"},
                step=values["step"],
            )

    def write_transcripts(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Append the transcripts of some clips: id, reference text, the model's transcript, and perhaps more."""
        _append(self.folder / TRANSCRIPTS_FILE, [{"step": step, **sample} for sample in samples])
        if self._run and samples:
            wandb = require("wandb", extra="wandb")
            columns = list(dict.fromkeys(name for sample in samples for name in sample))
            rows = [[sample.get(name) for name in columns] for sample in samples]
            self._run.log({"transcripts": wandb.Table(columns, rows)}, step=step)

    def close(self) -> None:
        """Wait until W&B has received everything."""
        if self._run:
            self._run.finish()


def draw_curves(folder: str | Path, *, title: str) -> list[dict[str, Any]]:
    """Draw a run's metrics to curves.png: loss, learning rate, gradient, speed and data wait; returns the metrics."""
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    lines = _read_lines(Path(folder) / METRICS_FILE)
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 2, sharex=True)
    loss, rate, speed, share = panels.flat
    red, gray = {"color": "tab:red"}, {"color": "tab:gray"}
    sets = dict.fromkeys(key for line in lines for key in line if key.startswith("validation_loss/"))
    curves: list[tuple[Any, str, str, dict[str, str]]] = [  # panel, key, label ("right": its right axis), style
        (loss, "loss", "training", {}),
        (loss, "validation_loss", "validation", {"marker": "o"}),
        *((loss, key, key.partition("/")[2], {"marker": ".", "linestyle": "--"}) for key in sets),
        (loss, "validation_wer", "validation WER (right)", {"marker": "o", **red}),
        (rate, "learning_rate", "learning rate", {}),
        (rate, "grad_norm", "gradient norm (log, right)", red),
        (speed, "tokens_per_s", "tokens/s", {}),
        (speed, "samples_per_s", "samples/s (right)", red),
        (share, "data_wait", "waiting for data", {}),
        (share, "mfu", "model FLOPs utilisation", {}),
        (share, "memory_gb", "memory, GB (right)", gray),
    ]
    for panel, key, label, style in curves:
        points = [(line["step"], line[key]) for line in lines if _is_drawable(key, line.get(key))]
        if points:  # a right axis is made only for a curve
            axes = panel.twinx() if label.endswith("right)") else panel
            markers = {"marker": "o"} if len(points) == 1 else {}  # a single point makes no line
            axes.plot(*zip(*points, strict=True), linewidth=1.2, markersize=3, label=label, **markers | style)
            axes.set(yscale="log" if key == "grad_norm" else "linear")
    drawn: list[Any] = [axes for axes in figure.axes if axes.lines]
    for axes in drawn:
        corner, anchor = ("lower left", (0, 1)) if axes in panels else ("lower right", (1, 1))  # where no curve runs
        axes.legend(fontsize=8, ncols=2, frameon=False, loc=corner, bbox_to_anchor=anchor)
        if axes.get_yscale() == "linear":
            highest = max(max(curve.get_ydata()) for curve in axes.lines)
            axes.set(ylim=(0, 1.05 * highest or 1))
    loss.set(ylabel="loss per label token (nats)")
    rate.set(ylabel="learning rate")
    speed.set(ylabel="tokens/s", xlabel="step")
    share.set(ylabel="share", xlabel="step", ylim=(0, 1))
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    return lines


def _is_drawable(key: str, value: float | None) -> bool:
    """Tell whether a value has a place in its panel; the gradient's axis is logarithmic and has no zero."""
    return value is not None and math.isfinite(value) and (value > 0 or key != "grad_norm")


def _wandb_run(folder: Path, recipe: Mapping[str, Any]) -> Any:
    """Start a W&B run, or resume the one that this folder started."""
    wandb, settings = require("wandb", extra="wandb"), recipe["wandb"]
    path = folder / "wandb-id.txt"
    run_id = path.read_text().strip() if path.is_file() else uuid.uuid4().hex[:12]
    write_atomic(path, run_id + "\n")
    return wandb.init(
        project=settings["project"],
        name=settings["name"] or folder.name,
        mode=settings["mode"],
        id=run_id,
        resume="allow",
        dir=str(folder),
        config=dict(recipe),
        settings=wandb.Settings(silent=True),
    )


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(dict(line), ensure_ascii=False) + "\n" for line in lines)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
