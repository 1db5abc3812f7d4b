"""Draw the pictures of the documents: the architecture, the three flows, and charts of the numbers in docs/data.

    python docs/draw.py [FOLDER]

writes NAME-light.svg and NAME-dark.svg of each picture, by default into docs/pictures. Texts become paths, so that a
picture looks the same with any fonts. The same data give the same files.
"""

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

HERE = Path(__file__).parent
DATA, PICTURES = HERE / "data", HERE / "pictures"
MARK = "data-"
"""Begins the ids of the elements that stand for numbers."""
TWICE_WHISPER = 15.6
"""Twice the word error rate of Whisper base on the clips of wer-by-audio.csv, percent."""
TITLE_LINE, SMALL_LINE = 0.19, 0.16
"""Heights of the lines in a box, inches."""
SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "graft",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


Point = tuple[float, float]


@dataclass(frozen=True)
class Theme:
    """The colours of a picture; ours and others differ in lightness, too, for readers who see no colours."""

    name: str
    paper: str
    ink: str
    faint: str
    grid: str
    ours: str
    others: str
    frozen: str
    learns: str
    learns_edge: str


THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#59636e", "#d8dee4", "#0550ae", "#b35900", "#eaeef2", "#ffe2bd", "#b35900"),
    Theme("dark", "#0d1117", "#e6edf3", "#a3adb8", "#2f3742", "#6cb6ff", "#f0a04b", "#21262d", "#4a2f0b", "#f0a04b"),
)


class Table(NamedTuple):
    """The rows of a file in docs/data, and what its first lines say of them: what, machine, date, command, page."""

    about: dict[str, str]
    rows: list[dict[str, str]]

    def column(self, name: str, **wanted: str) -> list[float]:
        """Return the numbers of a column in the rows that have the wanted texts."""
        return [float(row[name]) for row in self.rows if wanted.items() <= row.items()]

    def source(self) -> str:
        """Say where and when the numbers were measured."""
        return f"Measured on {self.about['machine']}, {self.about['date']}."


def read_table(name: str) -> Table:
    """Read docs/data/NAME.csv."""
    lines = (DATA / f"{name}.csv").read_text().splitlines()
    head = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    rows = csv.DictReader(line for line in lines if not line.startswith("# "))
    return Table(dict(line.split(": ", 1) for line in head), list(rows))


class Picture:
    """A figure of a size in inches, with its title, its source, and places given in inches from the lower left."""

    def __init__(self, theme: Theme, width: float, height: float, title: str, *, source: str = ""):
        self.theme, self.width, self.height, self.title = theme, width, height, title
        self.figure = Figure(figsize=(width, height), facecolor=theme.paper)
        self.text(0.15, height - 0.3, title, size=11.5, weight="bold")
        if source:
            self.text(0.15, 0.12, source, size=7.5, color=theme.faint)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text that begins at a place, unless its style says otherwise."""
        self.figure.text(x / self.width, y / self.height, text, **{"color": self.theme.ink} | style)

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Make axes in the theme's colours."""
        place = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place, facecolor=self.theme.paper)
        axes.tick_params(colors=self.theme.faint, labelcolor=self.theme.ink, length=0, pad=4)
        axes.grid(color=self.theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_color(self.theme.grid)
        return axes

    def canvas(self) -> "Canvas":
        """Make a surface for boxes and arrows that covers the picture."""
        axes = self.figure.add_axes((0, 0, 1, 1), facecolor="none")
        axes.set(xlim=(0, self.width), ylim=(0, self.height))
        axes.axis("off")
        return Canvas(self.theme, axes)


@dataclass(frozen=True)
class Canvas:
    """Boxes, texts and arrows in inches."""

    theme: Theme
    axes: Axes

    def box(
        self, corner: Point, width: float, height: float, text: str, *, state: str = "", at_top: bool = False
    ) -> None:
        """Draw a box by its lower left corner: a bold first line, smaller lines, a state; in the middle or at its top.

        A part that learns has the colour and the thick edge of learning, one that is trained has the colour.
        """
        theme, (x, y) = self.theme, corner
        is_learning = state in ("learn", "learns")
        fill = theme.learns if is_learning or state == "trained" else theme.frozen
        edge, line = (theme.learns_edge, 2.0) if is_learning else (theme.faint, 0.9)
        shape = "round,pad=0,rounding_size=0.07"
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=fill, edgecolor=edge, linewidth=line)
        )
        first, *others = text.split("\n")
        lines = [*others, *([state] if state else [])]
        text_height = TITLE_LINE + SMALL_LINE * len(lines)
        level = y + height - 0.1 if at_top else y + (height + text_height) / 2
        self.write(x + width / 2, level - TITLE_LINE / 2, first, weight="bold")
        for number, small in enumerate(lines):
            style = {"color": theme.learns_edge, "weight": "bold"} if is_learning and small == state else {}
            self.write(x + width / 2, level - TITLE_LINE - SMALL_LINE * (number + 0.5), small, size=8, **style)

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text around a place."""
        self.axes.text(x, y, text, **{"ha": "center", "va": "center", "color": self.theme.ink} | style)

    def arrow(self, start: Point, end: Point, kind: str = "-|>") -> None:
        """Draw an arrow, or a dotted line of kind "-"."""
        line = "solid" if kind == "-|>" else "dotted"
        style = {"arrowstyle": kind, "color": self.theme.faint, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", end, start, arrowprops=style | {"linestyle": line})


def architecture(theme: Theme) -> Picture:
    """Draw the parts of a graft, and which of them learn in which stage."""
    picture = Picture(theme, 9.2, 4.75, "Two small parts learn; Whisper and the language model stay as they are")
    canvas = picture.canvas()
    rows = (
        ("Stage 1", "The projector learns to\nhand speech over to the\nlanguage model."),
        ("Stage 2", "LoRA adapters learn to\ntranscribe, and the\nprojector learns on."),
        ("In use", "One checkpoint serves\narchives, HTTP clients\nand Python."),
    )
    states = {  # of the encoder, the projector and the language model, and the adapters with theirs
        "Stage 1": ("frozen", "learns", "frozen", None),
        "Stage 2": ("frozen", "learns", "frozen, in NF4", ("LoRA adapters", "learn")),
        "In use": ("unchanged", "trained", "unchanged", ("adapters merged in", "trained")),
    }
    height = 1.15
    for number, (stage, purpose) in enumerate(rows):
        encoder, projector, language_model, adapters = states[stage]
        bottom = 3.0 - 1.4 * number
        middle = bottom + height / 2
        canvas.write(0.15, middle + 0.36, stage, size=10.5, weight="bold", ha="left")
        canvas.write(0.15, middle - 0.12, purpose, size=8, color=theme.faint, ha="left", linespacing=1.35)
        canvas.write(2.12, middle, "speech")
        canvas.box((2.72, bottom), 1.55, height, "Whisper encoder\n50 states a second,\npooled to 25", state=encoder)
        canvas.box((4.62, bottom), 1.35, height, "Projector\n25 audio tokens\na second", state=projector)
        name = "Qwen2-VL language model"
        canvas.box((6.32, bottom), 2.25, height, name, state=language_model, at_top=bool(adapters))
        if adapters:
            canvas.box((6.57, bottom + 0.12), 1.75, 0.48, adapters[0], state=adapters[1])
        canvas.write(8.98, middle, "text")
        for start, end in ((2.4, 2.72), (4.27, 4.62), (5.97, 6.32), (8.57, 8.83)):
            canvas.arrow((start, middle), (end, middle))
    return picture


def flows(theme: Theme) -> Picture:
    """Draw training, bulk transcription and the service, and what they share."""
    picture = Picture(theme, 9.2, 4.45, "Three flows share one featurizer, one model and one transcriber")
    canvas = picture.canvas()
    rows = (
        (
            "Training\na parquet corpus on a\ndisk, in a bucket, on a hub",
            "Plan, decode, augment, featurize\none packed batch a block",
            "Training workers\nstage 1, then stage 2",
            "one merged\ncheckpoint",
        ),
        (
            "Archives\nrecordings of any\nlength and format",
            "Decode, find speech, cut\nitems of half an hour",
            "Pool of transcribers\nchunks in batches",
            "txt, srt, vtt,\njson, parquet",
        ),
        (
            "Service\nuploads by\nOpenAI's clients",
            "Decode, find speech, cut\neach upload in a process apart",
            "Engine replicas\none running batch each",
            "JSON, text,\nsubtitles, events",
        ),
    )
    shared = (("the same features", "the same weights"), ("the same chunks", "the same Transcriber"))
    columns = ((2.3, 2.6, "CPU workers"), (5.3, 2.1, "GPU workers"))
    height, pitch = 0.85, 1.3
    for left, width, name in columns:
        canvas.write(left + width / 2, 3.93, name, color=theme.faint)
    for number, (source, reading, computing, result) in enumerate(rows):
        bottom = 2.9 - pitch * number
        middle = bottom + height / 2
        canvas.box((0.15, bottom), 1.8, height, source)
        for (left, width, _), text in zip(columns, (reading, computing), strict=True):
            canvas.box((left, bottom), width, height, text)
        canvas.write(8.4, middle, result, linespacing=1.35)
        for start, end in ((1.95, 2.3), (4.9, 5.3), (7.4, 7.8)):
            canvas.arrow((start, middle), (end, middle))
        for (left, width, _), text in zip(columns, shared[number - 1] if number else (), strict=False):
            middle = left + width / 2
            canvas.arrow((middle, bottom + pitch), (middle, bottom + height), kind="-")
            place = (middle + 0.08, bottom + (pitch + height) / 2)
            canvas.write(*place, text, size=8, color=theme.faint, ha="left")
    return picture


def wer_by_audio(theme: Theme) -> Picture:
    """Chart the small graft's word error rate by the audio that it was trained on."""
    table = read_table("wer-by-audio")
    seconds, rates = table.column("audio_s"), table.column("wer_percent")
    title = f"More speech keeps helping: the small graft's WER fell from {max(rates):.1f} % to {rates[-1]:.1f} %"
    picture = Picture(theme, 7.4, 3.6, title, source=table.source())
    axes = picture.axes(0.6, 0.85, 6.5, 2.15)
    thousands = [value / 1000 for value in seconds]
    (line,) = axes.plot(thousands, rates, color=theme.ours, linewidth=2, marker="o", markersize=5)
    line.set_gid(f"{MARK}wer")
    for x, y in zip(thousands, rates, strict=True):
        axes.annotate(f"{y:.1f}", (x, y), (0, 7), textcoords="offset points", ha="center", color=theme.ink, size=8.5)
    axes.axhline(TWICE_WHISPER, color=theme.others, linewidth=1.4, linestyle=(0, (4, 3)))
    label = f"twice the errors of Whisper base: {TWICE_WHISPER} %"
    axes.text(50, TWICE_WHISPER - 1.2, label, color=theme.others, va="top", backgroundcolor=theme.paper)
    axes.set(ylim=(0, 34), xlim=(48, 152), xlabel="thousands of seconds of audio with transcripts")
    picture.text(
        0.15, 3.08, "WER of LibriSpeech test-other and telephone prompts together, %", color=theme.faint, size=8.5
    )
    axes.xaxis.label.set_color(theme.faint)
    return picture


def error_rates(theme: Theme) -> Picture:
    """Chart the small graft's word error rates beside Whisper base's, with their intervals."""
    table = read_table("error-rates")
    title = "The small graft makes 3 to 5 times the errors of Whisper base"
    picture = Picture(theme, 7.4, 3.3, title, source=f"{table.source()} Bars are 95 % intervals.")
    axes = picture.axes(1.85, 0.6, 5.25, 2.05)
    names = list(dict.fromkeys(row["set"] for row in table.rows))
    for row in table.rows:
        is_ours = row["system"] == "graft"
        place = 1.0 * (len(names) - names.index(row["set"])) + (0.17 if is_ours else -0.17)
        rate, low, high = (float(row[key]) for key in ("wer_percent", "low", "high"))
        color = theme.ours if is_ours else theme.others
        (bar,) = axes.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        (dot,) = axes.plot(rate, place, color=color, marker="o" if is_ours else "s", markersize=7)
        bar.set_gid(f"{MARK}interval")
        dot.set_gid(f"{MARK}rate")
        axes.annotate(f"{row['system']} {rate:.1f} %", (high, place), (6, 0), textcoords="offset points",
                      va="center", color=color, size=8.5)  # fmt: skip
    clips = {row["set"]: row["clips"] for row in table.rows}
    axes.set_yticks(
        [len(names) - number for number in range(len(names))], [f"{name}\n{clips[name]} clips" for name in names]
    )
    axes.set(xlim=(0, 44), ylim=(0.5, len(names) + 0.5))
    axes.grid(axis="y", visible=False)
    picture.text(1.85, 2.72, "word error rate, %", color=theme.faint, size=8.5)
    return picture


def transcribers(theme: Theme) -> Picture:
    """Chart the word error rate and the speed of transcribers on one core."""
    table = read_table("transcribers")
    title = "The small graft in int8: twice as fast as faster-whisper, with 2 to 5 times the errors"
    picture = Picture(theme, 8.4, 5.6, title, source=f"{table.source()} One thread each, greedy.")
    panels = {"wer_percent": "word error rate, % (lower is better)",
              "audio_s_per_s": "seconds of audio a second (higher is better)"}  # fmt: skip
    groups = list(dict.fromkeys(row["clips"] for row in table.rows))
    for number, (key, label) in enumerate(panels.items()):
        axes = picture.axes(2.05 + 3.2 * number, 0.45, 2.6, 4.4)
        values = [float(row[key]) for row in table.rows]
        for index, (row, value) in enumerate(zip(table.rows, values, strict=True)):
            place = -index - 1.3 * groups.index(row["clips"])
            color = theme.ours if row["system"].startswith("graft") else theme.others
            (bar,) = axes.barh(place, value, 0.68, color=color)
            bar.set_gid(f"{MARK}transcriber")
            axes.annotate(f"{value:.1f}", (value, place), (5, 0), textcoords="offset points", va="center",
                          color=theme.ink, size=8.5)  # fmt: skip
            if number == 0:
                name = row["system"].replace(", 8 together", "").replace(", clips together", "")
                axes.annotate(name, (0, place), (-6, 0), textcoords="offset points", va="center", ha="right",
                              color=theme.ink, size=8.5)  # fmt: skip
        for index, clips in enumerate(groups):
            first = [row["clips"] for row in table.rows].index(clips)
            axes.text(0, -first - 1.3 * index + 0.85, clips if number == 0 else "", color=theme.ink, size=8.5,
                      weight="bold", va="center")  # fmt: skip
        axes.set(xlim=(0, max(values) * 1.12), ylim=(-len(values) - 0.8, 1.3), xticks=[], yticks=[])
        axes.spines["bottom"].set_visible(False)
        picture.text(2.05 + 3.2 * number, 4.95, label, color=theme.faint, size=8.5)
    return picture


def service(theme: Theme) -> Picture:
    """Chart the service's latency and throughput by the number of clients, beside another server's."""
    table = read_table("service")
    title = "With 16 clients the service answers sooner than a plain server of Whisper base"
    picture = Picture(theme, 8.4, 3.5, title, source=table.source())
    panels = {"p95_s": "95th percentile of latency, s (lower is better)",
              "audio_s_per_s": "seconds of audio a second (higher is better)"}  # fmt: skip
    for number, (key, label) in enumerate(panels.items()):
        axes = picture.axes(0.5 + 4.1 * number, 0.8, 2.75, 1.95)
        for system, color, marker in (("graft", theme.ours, "o"), ("faster-whisper", theme.others, "s")):
            values = table.column(key, system=system)
            clients = table.column("clients", system=system)
            (line,) = axes.plot(range(len(values)), values, color=color, linewidth=2, marker=marker, markersize=6)
            line.set_gid(f"{MARK}service")
            end = (len(values) - 1, values[-1])
            style = {"textcoords": "offset points", "va": "center", "color": color, "size": 8.5}
            axes.annotate(f"{system}\n{values[-1]:g}", end, (9, 0), **style)
            axes.set_xticks(range(len(clients)), [f"{count:g}" for count in clients])
        axes.set(ylim=(0, None), xlim=(-0.15, len(values) - 0.85), xlabel="clients")
        axes.xaxis.label.set_color(theme.faint)
        picture.text(0.3 + 4.1 * number, 2.85, label, color=theme.faint, size=8.5)
    return picture


def training_step(theme: Theme) -> Picture:
    """Chart how many times as long as graft's a training step takes others, and graft without one of its gains."""
    table = read_table("training-step")
    others = table.column("times_wall", group="systems")
    title = f"A clip's training step takes other ways {others[1]:.1f} and {others[2]:.1f} times as long"
    picture = Picture(theme, 7.4, 3.6, title, source=table.source())
    axes = picture.axes(2.75, 0.5, 4.3, 2.55)
    rows = sorted(table.rows, key=lambda row: (row["group"] == "gains", float(row["times_wall"])))
    for number, row in enumerate(rows):
        place, times = -number - (0.6 if row["group"] == "gains" else 0), float(row["times_wall"])
        color = theme.ours if row["way"] == "graft" else theme.others if row["group"] == "systems" else theme.faint
        (bar,) = axes.barh(place, times, 0.62, color=color)
        bar.set_gid(f"{MARK}step")
        axes.text(times + 0.12, place, f"{times:.2f}", va="center", color=theme.ink, size=8.5)
        name = STEP_NAMES.get(row["way"], f"graft with {row['way']}")
        axes.text(-0.15, place, name, va="center", ha="right", color=theme.ink, size=8.5)
    axes.set(xlim=(0, 11.4), yticks=[], ylim=(-8.2, 0.6))
    axes.grid(axis="y", visible=False)
    axes.tick_params(labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    picture.text(2.75, 3.06, "wall time for a clip, in multiples of graft's", color=theme.faint, size=8.5)
    return picture


def demo(theme: Theme) -> Picture:
    """Chart the losses of a demo's two stages."""
    table = read_table("demo")
    first, last = (table.column("loss", stage=stage) for stage in ("stage 1", "stage 2"))
    title = f"make demo: the loss falls from {first[0]:.2f} to {first[-1]:.2f}, then to {last[-1]:.3f} with adapters"
    picture = Picture(theme, 7.4, 3.4, title, source=table.source())
    axes = picture.axes(0.6, 0.85, 6.0, 1.95)
    steps = [0.0]
    for stage, color, label in (("stage 1", theme.others, "projector"), ("stage 2", theme.ours, "adapters")):
        start = steps[-1]
        steps = [start + step for step in table.column("step", stage=stage)]
        losses = table.column("loss", stage=stage)
        (line,) = axes.plot(steps, losses, color=color, linewidth=2, marker="o", markersize=4)
        line.set_gid(f"{MARK}loss")
        place = (steps[1], losses[1])
        axes.annotate(f"{stage}: {label}", place, (10, 8), textcoords="offset points", color=color)
    axes.set(ylim=(0, None), xlabel="optimizer step of both stages")
    axes.xaxis.label.set_color(theme.faint)
    picture.text(0.15, 2.88, "loss for a label token, nats", color=theme.faint, size=8.5)
    return picture


def dashboard(theme: Theme) -> Picture:
    """Chart the panels of cluster/dashboard.json as they were under a real load."""
    table = read_table("dashboard")
    panels = list(dict.fromkeys(row["panel"] for row in table.rows))
    height = 1.45 * -(-len(panels) // 2) + 0.95
    title = "The dashboard's panels while 1, then 8, then 1 client asked the service"
    source = f"{table.source()} Drawn by docs/draw.py, not by Grafana."
    picture = Picture(theme, 9.2, height, title, source=source)
    colors = (theme.ours, theme.others, theme.faint, theme.ink)
    for number, panel in enumerate(panels):
        left, bottom = 0.55 + 4.6 * (number % 2), height - 1.85 - 1.45 * (number // 2)
        axes = picture.axes(left, bottom, 2.85, 0.9)
        is_last = number >= len(panels) - 2
        axes.tick_params(labelsize=7.5, labelbottom=is_last)
        names = list(dict.fromkeys(row["series"] for row in table.rows if row["panel"] == panel))
        for index, (name, color) in enumerate(zip(names, colors, strict=False)):
            wanted = {"panel": panel, "series": name}
            seconds, values = table.column("second", **wanted), table.column("value", **wanted)
            (line,) = axes.plot(seconds, values, color=color, linewidth=1.3, linestyle=("-", "--", ":", "-.")[index])
            line.set_gid(f"{MARK}series")
            picture.text(left + 2.95, bottom + 0.78 - 0.19 * index, name, color=color, size=7.5)
        axes.set(ylim=(0, None), xlim=(0, max(map(float, (row["second"] for row in table.rows)))))
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        if is_last:
            picture.text(left + 2.95, bottom - 0.15, "seconds", size=7.5, color=theme.faint)
        picture.text(left - 0.35, bottom + 1.02, f"{panel}{UNITS.get(panel, '')}", size=8.5, weight="bold")
    return picture


UNITS = {
    "Requests by status": ", a second",
    "Latency": ", s",
    "Time to first text": ", s",
    "Queue: speech": ", s",
    "Failed requests": ", share",
    "Busy": ", share of the time",
}
STEP_NAMES = {
    "graft": "graft",
    "seed-style": "the reference system's way",
    "AudioFlamingo3": "transformers' AudioFlamingo3",
    "50 Hz (no pooling)": "graft with 50 tokens a second",
    "30 s window (750 tokens)": "graft with a 30 s window a clip",
    "arrival order": "graft with clips in arrival order",
}
PICTURES_BY_NAME: dict[str, Callable[[Theme], Picture]] = {
    "architecture": architecture,
    "flows": flows,
    "wer-by-audio": wer_by_audio,
    "error-rates": error_rates,
    "transcribers": transcribers,
    "service": service,
    "training-step": training_step,
    "demo": demo,
    "dashboard": dashboard,
}


def draw(folder: Path) -> list[Path]:
    """Draw all pictures in all themes into a folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with rc_context(SETTINGS):
        for name, make in PICTURES_BY_NAME.items():
            for theme in THEMES:
                picture = make(theme)
                files.append(folder / f"{name}-{theme.name}.svg")
                metadata = {"Title": picture.title, "Date": None, "Creator": None}
                picture.figure.savefig(files[-1], metadata=metadata)
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all pictures."""
    arguments = sys.argv[1:] if argv is None else argv
    for path in draw(Path(arguments[0]) if arguments else PICTURES):
        print(path)


if __name__ == "__main__":
    main()
