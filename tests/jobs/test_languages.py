"""The languages of a corpus part its test sets, and reach the models that can be told them."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from graft.data.settings import Columns, Source
from graft.errors import ModelError
from graft.inference.transcriber import open_transcriber
from jobs.evaluation.test_sets import as_rows, labelled
from jobs.transcription.pipeline import languages_for_model
from tests.support import media, tiny_models
from tests.support.jobs import transcribe
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
    with pytest.raises(ModelError, match=r"2 recordings are in de, and .*whisper knows en: choose another model"):
        languages_for_model(table, whisper)


LANGUAGES = {"a": "German", "b": "vi-VN", "c": "", "d": "jpn"}


@pytest.mark.seconds
def test_recordings_of_several_languages_get_their_own_prompts_and_rows_that_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_whisper(tmp_path / "whisper", varied=True, languages=("de", "en", "ja", "vi"))
    audio = media.SHORTEST_FIRST[0].read_bytes()
    rows = [
        row(name, 0, spk_id=language, wav={"bytes": audio, "path": f"{name}.flac"}, duration=1.0)
        for name, language in LANGUAGES.items()
    ]
    (tmp_path / "list.txt").write_text("".join(f"{name}.flac\t{one}\n" for name, one in LANGUAGES.items() if one))
    for name in LANGUAGES:
        (tmp_path / f"{name}.flac").write_bytes(audio)
    opened = open_transcriber(model)
    expected = {one: opened.transcribe(audio, language=one).text for one in ("de", "en", "ja", "vi")}
    heard = opened.transcribe(audio).language
    opened.close()
    assert len(set(expected.values())) == 4
    named = [f"audio={corpus(tmp_path / 'a.parquet', rows)}", "columns.language=spk_id"]
    for place, (arguments, other) in enumerate(
        [(named, heard), ([*named, "language=en"], "en"), ([f"audio={tmp_path / 'list.txt'}"], None)]
    ):
        out = tmp_path / str(place)
        assert transcribe(f"model={model}", *arguments, f"out={out}") == 0
        table = pq.read_table(out / "recordings", partitioning=None).to_pylist()
        languages = ["de", "vi", *([other] if other else []), "ja"]
        assert [one["language"] for one in table] == languages
        assert [one["text"] for one in table] == [expected[one] for one in languages]
        written = json.loads(next((out / "files").glob("b*.json")).read_text())
        assert (written["language"], written["text"]) == ("vi", expected["vi"])
    capsys.readouterr()

    # A file in another language is another version of the recording: it is transcribed again.
    (tmp_path / "list.txt").write_text("a.flac\tvi\nb.flac\tvi\n")
    assert transcribe(f"model={model}", f"audio={tmp_path / 'list.txt'}", f"out={tmp_path / '2'}") == 0
    table = pq.read_table(tmp_path / "2" / "recordings", partitioning=None).to_pylist()
    assert [one["text"] for one in table] == [expected["vi"], expected["vi"]]

    (tmp_path / "list.txt").write_text("a.flac\tvi\nb.flac\tfr\n")
    assert transcribe(f"model={model}", f"audio={tmp_path / 'list.txt'}", f"out={tmp_path / 'none'}") == 2
    (tmp_path / "list.txt").write_text("a.flac\tKlingon\n")
    assert transcribe(f"model={model}", f"audio={tmp_path / 'list.txt'}", f"out={tmp_path / 'none'}") == 2
    known, unknown = capsys.readouterr().err.splitlines()[-2:]
    assert f"1 recording is in fr, and {model} knows de, en, ja, vi: choose another model" in known
    assert "language 'Klingon' is none that is known: give its code by ISO 639-1, such as de" in unknown
