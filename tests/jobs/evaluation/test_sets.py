"""Test sets know their speakers, and no two clips of one have the same id."""

from pathlib import Path

import pyarrow.parquet as pq

from jobs.evaluation.check_sets import swapped
from jobs.evaluation.test_sets import labelled
from tests.support.speech_corpus import corpus, row


def test_clips_have_ids_of_their_own_and_speakers(tmp_path: Path) -> None:
    rows = [row("a", 0, spk_id="anna", sex="f"), row("b", 1, spk_id="", sex=""), row("a", 2, spk_id="ben", sex="m")]
    path = corpus(tmp_path / "dev.parquet", rows)
    items = labelled("dev", path, limit=None)
    assert [(item.id, item.audio_id) for item in items] == [("a", "a"), ("b", "b"), ("a#2", "a#2")]
    known = [{"speaker": "anna", "sex": "f"}, {}, {"speaker": "ben", "sex": "m"}]
    assert [item.known for item in items] == known
    assert [(item.id, item.audio_id, item.known) for item in swapped(items)] == [
        ("a", "b", known[0]),
        ("b", "a#2", known[1]),
        ("a#2", "a", known[2]),
    ]
    bare = tmp_path / "bare.parquet"
    table = pq.read_table(path).drop_columns(["spk_id", "sex"])
    pq.write_table(table.append_column("corpus", [["calls", None, "talks"]]), bare, row_group_size=2)
    assert [item.known for item in labelled("dev", str(bare), limit=None)] == [
        {"source": "calls"},
        {},
        {"source": "talks"},
    ]
