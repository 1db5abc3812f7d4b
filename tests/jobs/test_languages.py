"""The languages of a corpus part its test sets, and reach the models that can be told them."""

from pathlib import Path

import pytest

from graft.data.settings import Columns, Source
from graft.errors import ModelError
from jobs.evaluation.test_sets import as_rows, labelled
from jobs.transcription.pipeline import languages_for_model
from tests.support import tiny_models
from tests.support.speech_corpus import corpus, row, save_tiny_whisper


def test_a_set_of_several_languages_is_one_for_each(tmp_path: Path) -> None:
    rows = [row(f"c{seed}", seed, spk_id=language) for seed, language in enumerate(["de", "vi-VN", "de", None])]
    source = Source(files=corpus(tmp_path / "a.parquet", rows), columns=Columns(language="spk_id"))
    items = labelled("test", source, limit=None)
    assert [(item.set_name, item.language) for item in items] == [
        *[("test de", "de"), ("test vi", "vi"), ("test de", "de"), ("test unknown", None)]
    ]
    assert {item.set_name for item in labelled("test", source.files, limit=None, language="de")} == {"test"}
    table = as_rows(items)
    assert [table.language_of(place) for place in range(4)] == ["de", "vi", "de", None]
    graft = str(tiny_models.save_tiny_graft(tmp_path / "graft"))
    assert languages_for_model(table, graft).languages == [""]
    whisper = save_tiny_whisper(tmp_path / "whisper")
    with pytest.raises(ModelError, match=r"2 clips are in de, and .*whisper knows en: choose another model"):
        languages_for_model(table, whisper)
