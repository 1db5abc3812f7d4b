"""Test tracking: metrics after resuming, curves, and a Weights & Biases run read back from its own file."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from graft.training.tracking import Tracker, draw_curves


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "learning_rate": 1e-3, "mfu": None, **more}


def test_resumed_metrics_continue_from_the_checkpoint_and_are_drawn(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, {}, from_step=0)
    for step in (1, 2, 3):
        tracker.write(line(step))
        tracker.write_transcripts(step, [{"id": "a", "text": "yes", "heard": f"no {step}"}])
    again = Tracker(tmp_path, {}, from_step=2)
    again.write(line(3, loss=0.5))
    again.write({"step": 3, "validation_loss": 0.7})
    lines = draw_curves(tmp_path, title="stage 1")
    assert [(one["step"], one["loss"]) for one in lines if "loss" in one] == [(1, 3.0), (2, 1.5), (3, 0.5)]
    assert [json.loads(one)["heard"] for one in (tmp_path / "transcripts.jsonl").read_text().splitlines()] == [
        "no 1",
        "no 2",
    ]
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 10_000


@pytest.mark.parametrize(
    ("values", "right"),
    [
        ({}, []),
        ({"grad_norm": 0.0}, []),  # a logarithmic axis has no place for it
        ({"grad_norm": 0.5, "memory_gb": None}, ["gradient norm (log, right)"]),
        ({"samples_per_s": 2.0, "memory_gb": 1.0}, ["samples/s (right)", "memory, GB (right)"]),
    ],
)
def test_a_right_axis_is_drawn_only_for_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], right: list[str]
) -> None:
    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **how: (drawn.append(self), save(self, *given, **how)))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(1, **values)) + "\n")
    draw_curves(tmp_path, title="stage 1")
    (figure,) = drawn
    curves = {axes: axes.lines for axes in figure.axes[4:]}
    assert [curve.get_label() for lines in curves.values() for curve in lines] == right
    assert all(curves.values())
    assert all(curve.get_marker() == "o" for lines in curves.values() for curve in lines)  # one point makes no line


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.processes
def test_a_wandb_run_is_written_offline_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    recipe = {"learning_rate": 1e-3, "wandb": {"project": "encoder_model", "name": None, "mode": "offline"}}
    for steps in ((1, 2), (3,)):
        tracker = Tracker(tmp_path, recipe, from_step=steps[0] - 1)
        for step in steps:
            tracker.write(line(step))
            tracker.write_transcripts(step, [{"id": "a", "text": "yes", "heard": "no"}])
        tracker.close()
    wandb.teardown()  # its own process writes the files
    records = [record for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")) for record in stored(path)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {run.project for run in runs} == {"encoder_model"}
    assert {run.display_name for run in runs} == {tmp_path.name}
    assert {run.run_id for run in runs} == {(tmp_path / "wandb-id.txt").read_text().strip()}
    assert any(item.key == "learning_rate" and item.value_json == "0.001" for run in runs for item in run.config.update)
    told = [
        {key_of(item): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [one["loss"] for one in told] == [3.0, 1.5, 1.0]
    assert [one["_step"] for one in told] == [1, 2, 3]
    assert all("mfu" not in one and one["transcripts._type"] == "table-file" for one in told)


def key_of(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


BLOCK = 32_768


def stored(path: Path) -> list[Any]:
    """Read an offline run's file: LevelDB's log format after seven bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)  # after a checksum
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or a record's last part
            records.append(Record.FromString(parts))
            parts = b""
    return records
