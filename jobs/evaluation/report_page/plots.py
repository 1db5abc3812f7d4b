"""Draw the plots of the page: SVG with texts as texts, in colours of the page's style.

Colours are written as variables of page.css, so that plots follow light and dark.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.errors import require

INK, LINE, PAPER, FAINT = "#010203", "#040506", "#070809", "#0a0b0c"
SERIES = ("#100001", "#100002", "#100003", "#100004", "#100005")
"""Stand-ins for the colours, which no plot has otherwise."""
VARIABLES = {INK: "--ink", LINE: "--line", PAPER: "--paper", FAINT: "--faint"} | {
    colour: f"--series-{place}" for place, colour in enumerate(SERIES)
}
WIDTH = 8.0
"""Inches of a plot, 72 units each."""
PEERS_SOURCE = "figures published on the Open ASR Leaderboard (November 2026), means over its sets on its GPU"
PEERS = {
    "granite-speech-4.1-2b": (0.0533, 231),
    "canary-qwen-2.5b": (0.0563, 418),
    "granite-speech-3.3-8b": (0.0574, 145),
    "Qwen3-ASR-1.7B": (0.0576, 148),
    "whisper-large-v3-turbo": (0.0783, 200),
}
"""Published WER and RTFx of models of the field."""
MOST_GROUPS = 40


@dataclass(frozen=True)
class Plot:
    """A plot: its SVG, what it shows in words for those who do not see it, and its caption."""

    svg: str
    label: str
    caption: str


def speed_plot(points: Mapping[str, tuple[float, float]]) -> Plot:
    """Plot WER over seconds of audio per second, for systems (WER, RTFx), beside published peers."""
    figure, axes = _figure(3.6)
    for place, (system, (wer, rtfx)) in enumerate(points.items()):
        axes.plot([rtfx], [100 * wer], "o", markersize=8, color=SERIES[place % len(SERIES)])
        _name(axes, system, rtfx, 100 * wer, INK)
    for number, (wer, rtfx) in enumerate(PEERS.values(), start=1):
        axes.plot([rtfx], [100 * wer], "o", markersize=6, markerfacecolor="none", color=FAINT)
        axes.annotate(str(number), (rtfx, 100 * wer), xytext=(0, 6 if number % 2 else -14), textcoords="offset points")
    axes.set(xscale="log", xlabel="seconds of audio per second (RTFx)", ylabel="WER, %")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.25, y=0.15)
    peers = ", ".join(f"{number} {name}" for number, name in enumerate(PEERS, start=1))
    told = ", ".join(f"{system} {wer:.1%} at {rtfx:.1f}" for system, (wer, rtfx) in points.items())
    caption = (
        f"Filled: this evaluation, on its machine. Hollow: {peers}; {PEERS_SOURCE}, so of other data and hardware."
    )
    return Plot(_svg(figure, "speed"), f"WER over RTFx: {told}", caption)


def group_plot(name: str, column: str, groups: Mapping[str, Any], systems: Sequence[str]) -> Plot:
    """Plot the WER of each group of a set, such as its speakers, with intervals; the largest groups where many."""
    chosen = sorted(groups.items(), key=lambda one: -one[1]["clips"])[:MOST_GROUPS]
    order = [group for group in groups if group in dict(chosen)]
    figure, axes = _figure(min(7.0, 1.6 + 0.16 * len(order) * len(systems)))
    height = 0.8 / len(systems)
    for place, system in enumerate(systems):
        rows = [(at, groups[group]["systems"].get(system)) for at, group in enumerate(order)]
        known = [(at, one) for at, one in rows if one]
        wer = [100 * one["wer"] for _, one in known]
        below = [max(0.0, 100 * (one["wer"] - one["wer_low"])) for _, one in known]
        above = [max(0.0, 100 * (one["wer_high"] - one["wer"])) for _, one in known]
        at = [at + (place - (len(systems) - 1) / 2) * height for at, _ in known]
        colour = SERIES[place % len(SERIES)]
        axes.barh(at, wer, height, color=colour, alpha=0.35, label=system)
        axes.errorbar(wer, at, xerr=[below, above], fmt="o", markersize=3, color=colour)
    axes.set_yticks(range(len(order)), [f"{_short(group)} ({groups[group]['clips']})" for group in order])
    axes.invert_yaxis()
    axes.set(xlabel="WER, %")
    axes.set_xlim(left=0)
    _legend(axes)
    left_out = f" The {len(chosen)} largest of {len(groups)} groups." if len(groups) > len(chosen) else ""
    told = "; ".join(
        f"{group}: " + ", ".join(f"{system} {one['wer']:.1%}" for system, one in groups[group]["systems"].items())
        for group in order[:12]
    )
    return Plot(
        _svg(figure, f"{name} {column}"),
        f"WER of {name} by {column}: {told}",
        f"{name} by {column}, with 95 % intervals and numbers of clips.{left_out}",
    )


def histogram_plot(data: Mapping[str, Any]) -> Plot:
    """Plot how long the clips of each set are."""
    figure, axes = _figure(2.6)
    for place, (name, one) in enumerate(data.items()):
        edges, counts = one["histogram"]["edges_s"], one["histogram"]["clips"]
        axes.stairs(counts, edges, color=SERIES[place % len(SERIES)], label=name, linewidth=1.6)
    axes.set(xlabel="length of a clip, s", ylabel="clips")
    _legend(axes)
    told = ", ".join(f"{name}: median {one['duration_s']['0.5']:.1f} s" for name, one in data.items())
    return Plot(_svg(figure, "lengths"), f"Lengths of clips: {told}", "How long the clips are.")


def curves_plot(run: Mapping[str, Any]) -> Plot:
    """Plot the loss of a stage in training and validation, and the word error rate in validation."""
    figure, axes = _figure(3.2)
    curves = run["curves"]
    axes.plot(curves["step"], curves["loss"], color=SERIES[0], linewidth=1.2, label="training loss")
    right = None
    for place, (name, one) in enumerate(run["validation"].items(), start=1):
        colour = SERIES[place % len(SERIES)]
        axes.plot(one["step"], one["loss"], "o-", markersize=3, color=colour, label=f"validation loss {name}".strip())
        if any(value is not None for value in one["wer"]):
            right = right or axes.twinx()
            wer = [float("nan") if value is None else 100 * value for value in one["wer"]]
            right.plot(one["step"], wer, "s--", markersize=3, color=colour, label=f"WER {name}".strip())
    axes.set(xlabel="step", ylabel="loss, nats per label token")
    axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    if right is not None:
        right.set_ylabel("WER, %")
        right.set_ylim(bottom=0)
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    _legend(axes, handles, labels)
    losses = [loss for loss in curves["loss"] if loss is not None]
    told = f"Loss of {run['folder']}, from {losses[0]:.2f} to {losses[-1]:.2f}" if losses else run["folder"]
    return Plot(_svg(figure, run["folder"]), told, f"{run['folder']}: {curves['step'][-1] if losses else 0} steps.")


def _figure(height: float) -> tuple[Any, Any]:
    require("matplotlib", extra="report")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any, *entries: Any) -> None:
    """Put the legend above the axes, where no data are."""
    axes.legend(*entries, frameon=False, fontsize=9, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))


def _name(axes: Any, text: str, x: float, y: float, colour: str) -> None:
    axes.annotate(_short(text), (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8, color=colour)


def _short(text: str, most: int = 40) -> str:
    """Cut a long name."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _svg(figure: Any, name: str) -> str:
    """Write a figure as SVG that takes the page's colours and width; equal figures give equal bytes."""
    from matplotlib import rc_context

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name}
    buffer = io.StringIO()
    _colour(figure)
    with rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    # Ids are the same in plots of equal parts.
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'id="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _colour(figure: Any) -> None:
    """Give texts, ticks and frames the page's colours, and read no formulas in texts."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        if text.get_color() not in VARIABLES:
            text.set_color(INK)
    for axes in figure.axes:
        axes.tick_params(colors=INK, labelsize=9)
        for spine in axes.spines.values():
            spine.set_color(LINE)
