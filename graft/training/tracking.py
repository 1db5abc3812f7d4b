"""What a run leaves to look at: metrics as JSON lines, and its loss curve as a picture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.errors import require

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"


class MetricsLog:
    """Appends one JSON object a line; on resuming, lines from after the checkpoint's step are dropped."""

    def __init__(self, folder: str | Path, *, from_step: int):
        self.path = Path(folder) / METRICS_FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= from_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, values: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(dict(values)) + "\n")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    path = Path(folder) / METRICS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def draw_loss(folder: str | Path, *, title: str) -> Path:
    """Draw the loss and learning rate over the steps of a run's metrics to a PNG beside them."""
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    lines = read_metrics(folder)
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [line["loss"] for line in lines], marker="o", markersize=2.5, color="tab:blue")
    axes.set(title=title, xlabel="step", ylabel="loss per label token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(steps, [line["learning_rate"] for line in lines], color="tab:gray", linewidth=1, linestyle="--")
    rates.set(ylabel="learning rate (dashed)", ylim=(0, None))
    path = Path(folder) / CURVE_FILE
    figure.savefig(path, dpi=120)
    return path
