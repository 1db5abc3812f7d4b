"""Tests that the bundled speech is small, licensed, described correctly, and split without shared texts."""

import json

import pytest

from graft.audio.clip import read_audio
from graft.data.splits import comparable_text
from tests.support.paths import ROOT

PROMPTS = ROOT / "jobs" / "data" / "prompts"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "count", "shortest_s", "longest_s"), [("train", 64, 0.9, 4.5), ("unseen", 20, 1.3, 8.0)]
)
def test_clips_are_what_the_manifest_says(name: str, count: int, shortest_s: float, longest_s: float) -> None:
    clips = rows(name)
    assert len({row["id"] for row in clips}) == len(clips) == count
    assert len({comparable_text(row["text"]) for row in clips}) == count
    for row in clips:
        assert read_audio(PROMPTS / row["audio"]).duration_s == pytest.approx(row["duration_s"], abs=1e-3)
        assert shortest_s <= row["duration_s"] <= longest_s
        assert (row["speaker"], row["licence"], row["lang"]) == ("prompt-voice", "CC-BY-SA-3.0", "en")


def test_no_text_is_both_trained_and_unseen() -> None:
    trained, unseen = ({comparable_text(row["text"]) for row in rows(name)} for name in ("train", "unseen"))
    assert not trained & unseen


def test_speech_fits_the_repository() -> None:
    audio = {path.relative_to(PROMPTS).as_posix(): path.stat().st_size for path in PROMPTS.rglob("*.flac")}
    assert audio.keys() == {row["audio"] for name in ("train", "unseen") for row in rows(name)}
    assert sum(audio.values()) < 4.5e6
    notice = (PROMPTS / "NOTICE.md").read_text()
    assert "CC BY-SA 3.0" in notice
    assert "https://creativecommons.org/licenses/by-sa/3.0/" in notice
