"""Test jobs.format with a tiny Whisper on a local Ray, and a corpus that reads the texts it wrote."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from graft.audio.chunking import Chunk, windows
from graft.audio.clip import read_audio
from graft.data.dataset import read_rows
from graft.data.settings import Source
from graft.inference.segments import Segment
from graft.inference.transcriber import open_transcriber
from graft.text.prompts import style_text
from graft.text.punctuation import transfer_formatting
from jobs.common.cli import run_job
from jobs.format import FormatRecipe
from jobs.format import run as run_format
from jobs.transcription.pipeline import Pipeline, Workers, transcribe_rows
from jobs.transcription.reader import WINDOWS
from tests.support.speech_corpus import BROKEN, corpus, row, save_tiny_whisper

pytestmark = pytest.mark.usefixtures("ray_started")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> str:
    return save_tiny_whisper(tmp_path_factory.mktemp("format") / "whisper")


def run(*arguments: str) -> int:
    return run_job(FormatRecipe, run_format, summary="", argv=list(arguments))


def labelled(whisper: str, count: int) -> tuple[list[dict], list[str]]:
    """Make clips whose labels agree with this Whisper's transcripts wholly or by half; returns both."""
    clips = [row(f"clip{seed}", seed) for seed in range(count)]
    transcriber = open_transcriber(whisper, chunker=windows)
    heard = [one.text for one in transcriber.transcribe_many([read_audio(clip["wav"]["bytes"]) for clip in clips])]
    transcriber.close()
    for seed, (clip, transcript) in enumerate(zip(clips, heard, strict=True)):
        words = style_text(transcript, "lower").upper()
        clip["text"] = words if seed % 2 else f"{words} {' '.join(['OTHER'] * (len(words.split()) + 1))}"
    return clips, heard


class Echo:
    """A model that answers with given texts, in order, formatted."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = iter(texts)

    async def find_language(self, chunks: Sequence[Chunk]) -> str | None:
        return None

    async def transcribe_chunks(self, chunks: Sequence[Chunk]) -> list[Segment]:
        return [Segment(0.0, chunk.clip.duration_s, f"{next(self._texts).capitalize()}!") for chunk in chunks]


@pytest.mark.slow
def test_a_corpus_is_formatted_and_read_again(whisper, tmp_path, capsys):
    """A second run changes nothing, and one that begins with results of another model keeps them."""
    clips, heard = labelled(whisper, 6)
    own = row("own", 7, text="Written already, I see.")
    data = corpus(
        tmp_path / "clips.parquet",
        [*clips, own, row("broken", 8, text="BROKEN WORDS", **BROKEN), row("empty", 9, text=" ")],
    )
    arguments = [f"data={data}", f"out={tmp_path / 'out'}", f"model={whisper}", "least_agreement=0.6"]
    assert run(*arguments, "batch_clips=2", "part_clips=4") == 0

    expected = {
        clip["ID"]: transfer_formatting(clip["text"], transcript) for clip, transcript in zip(clips, heard, strict=True)
    }
    formatted = {name: one.text for name, one in expected.items() if one.agreement >= 0.6}
    assert 0 < len(formatted) < 6
    texts = {
        **{clip["ID"]: clip["text"] for clip in clips},
        **formatted,
        "own": own["text"],
        "broken": "BROKEN WORDS",
        "empty": " ",
    }
    table = pq.read_table(tmp_path / "out" / "texts.parquet")
    assert dict(zip(table["ID"].to_pylist(), table["text"].to_pylist(), strict=True)) == texts
    rows = read_rows(Source(files=data, texts=str(tmp_path / "out" / "texts.parquet")))
    assert {rows.id(place): rows.text(place) for place in range(len(rows))} == texts

    words, agreed = sum(one.words for one in expected.values()), sum(one.agreed for one in expected.values())
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result == {
        "clips": 9,
        "formatted": len(formatted),
        "kept": 6 - len(formatted),
        "own": 2,
        "unheard": 1,
        "agreement": pytest.approx(agreed / words),
    }
    told = capsys.readouterr()
    assert (
        f"format: {agreed / words:.1%} of the words heard agree; of 9 clips {len(formatted)} are formatted" in told.out
    )
    assert "graft: broken: not readable as audio" in told.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"texts.parquet", "result.json", "recipe.yaml"}

    # A second run changes nothing, and another recipe's results are left alone.
    before = (tmp_path / "out" / "texts.parquet").stat().st_mtime_ns
    assert run(*arguments, "batch_clips=2", "part_clips=4") == 0
    assert (tmp_path / "out" / "texts.parquet").stat().st_mtime_ns == before
    assert run(*arguments, "batch_clips=2", "part_clips=5") == 2

    # Where a run was cut off, it goes on: two of nine clips have results, of another model, and keep them.
    again = tmp_path / "again"
    again.mkdir()
    (again / "recipe.yaml").write_text(
        (tmp_path / "out" / "recipe.yaml").read_text().replace(str(tmp_path / "out"), str(again))
    )
    echo = Pipeline(WINDOWS, functools.partial(Echo, [clip["text"] for clip in clips[:2]]), Workers(1, 1, 1, 0, 2))
    found = list(transcribe_rows(read_rows(data).select(np.arange(2)), again / "work", echo))
    assert [clip.text for clip in found] == [f"{clip['text'].capitalize()}!" for clip in clips[:2]]
    capsys.readouterr()
    assert run(*arguments, f"out={again}", "batch_clips=2", "part_clips=4") == 0
    assert "7/7 recordings" in capsys.readouterr().out
    resumed = pq.read_table(again / "texts.parquet")["text"].to_pylist()
    assert resumed[:2] == [clip.text for clip in found] != table["text"].to_pylist()[:2]
    assert resumed[2:] == table["text"].to_pylist()[2:]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "{data}"}, "config.json"),
        ({"data": "[{missing}]"}, "missing.parquet"),
        ({"data": "[{twice}]"}, "1 rows have the ID of another one"),
        ({"least_agreement": "2"}, "least_agreement=2: give a number from 0 to 1"),
    ],
)
def test_errors_are_reported_before_anything_is_transcribed(whisper, tmp_path, capsys, changed, message):
    places = {name: str(tmp_path / f"{name}.parquet") for name in ("data", "missing", "twice")}
    corpus(Path(places["data"]), [row("one", 1)])
    corpus(Path(places["twice"]), [row("one", 1), row("one", 2)])
    values = {"data": "{data}", "out": str(tmp_path / "out"), "model": whisper, **changed}
    assert run(*(f"{key}={value.format(**places)}" for key, value in values.items())) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()
