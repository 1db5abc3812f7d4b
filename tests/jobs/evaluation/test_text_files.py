"""Anybody's files become predictions, and lines that cannot be read are named."""

import io
import json
from pathlib import Path

import pytest

from graft.errors import DataError
from jobs.evaluation.predictions import PredictedWord, Prediction, read_predictions, write_predictions
from jobs.evaluation.text_files import read_texts

WHOLE = Prediction(
    "c1", "dev", "graft", "good morning", "good morning", 1.5, "en", "anna", "f", "calls", 0.25,
    (PredictedWord("good", 0.1, 0.4, 0.9), PredictedWord("morning")), ("loop",), None, {"snr_db": 12.5},
)  # fmt: skip


def read(path: Path, content: str, role: str = "hypothesis", **columns: str) -> list[Prediction]:
    path.write_text(content, encoding="utf-8")
    return list(read_texts(str(path), role, columns))  # type: ignore[arg-type]


def test_predictions_survive_writing_and_reading(tmp_path: Path) -> None:
    failed = Prediction("c2", "dev", "graft", "été", error="not audio")
    file = io.StringIO()
    write_predictions([WHOLE, failed], file)
    assert "été" in file.getvalue()
    assert "null" not in file.getvalue()
    assert list(read_predictions(file.getvalue().splitlines(), "file")) == [WHOLE, failed]
    assert read(tmp_path / "predictions.jsonl", file.getvalue()) == [WHOLE, failed]
    empty = Prediction("c3", reference="a", hypothesis="")  # an empty answer is an answer
    file = io.StringIO()
    write_predictions([empty], file)
    assert list(read_predictions([file.getvalue()], "file")) == [empty]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "a list, wants an object"),
        ('{"hypothesis": "a"}', "no id"),
        ('{"id": "a", "hypothesis": 5}', "hypothesis is 5, wants a text"),
        ('{"id": "a", "duration_s": "long"}', "could not convert"),
        ('{"id": "a", "duration_s": -1}', "duration_s is -1, wants a number of seconds"),
        ('{"id": "a", "words": ["b"]}', "'b' is no word"),
    ],
)
def test_lines_that_are_no_predictions_are_named(line: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"file: line 2 is no prediction .*{reason}"):
        list(read_predictions(["", line], "file"))


def test_manifests_of_nemo_and_of_the_leaderboard_are_read(tmp_path: Path) -> None:
    line = {"audio_filepath": "wav/a.wav", "duration": 2.0, "text": "good morning", "pred_text": "good mourning"}
    (found,) = read(tmp_path / "nemo.json", json.dumps(line))
    assert found == Prediction("wav/a.wav", reference="good morning", hypothesis="good mourning", duration_s=2.0)
    parts = [line | {"offset": offset} for offset in (0, 2.5)]
    assert [one.id for one in read(tmp_path / "parts.json", "\n".join(map(json.dumps, parts)))] == [
        "wav/a.wav",
        "wav/a.wav@2.5",
    ]
    named = tmp_path / "MODEL_openai-whisper-base_DATASET_hf-audio_ami_test.jsonl"
    (found,) = read(named, json.dumps(line | {"time": 0.5}))
    assert (found.system, found.set_name, found.seconds) == ("openai-whisper-base", "hf-audio_ami_test", 0.5)
    assert [one.id for one in read_texts(str(tmp_path), "hypothesis")] == ["wav/a.wav"]  # the *.jsonl of a folder
    assert len(list(read_texts(str(tmp_path / "*.json*"), "hypothesis"))) == 4


def test_the_one_text_of_a_line_is_what_the_caller_says(tmp_path: Path) -> None:
    for role in ("reference", "hypothesis"):
        (found,) = read(tmp_path / "texts.jsonl", '{"id": "a", "text": "good"}', role)
        assert (found.reference, found.hypothesis) == (("good", None) if role == "reference" else (None, "good"))
    (found,) = read(tmp_path / "both.jsonl", '{"id": "a", "reference": "good", "text": "food"}', "reference")
    assert (found.reference, found.hypothesis) == ("good", "food")


def test_tables_are_read(tmp_path: Path) -> None:
    content = 'id,reference,hypothesis,snr\na,"good, morning",good morning,5\nb,,"",\n'
    assert read(tmp_path / "a.csv", content) == [
        Prediction("a", reference="good, morning", hypothesis="good morning", more={"snr": "5"}),
        Prediction("b", reference="", hypothesis="", more={"snr": ""}),
    ]
    (found,) = read(tmp_path / "cv.tsv", 'path\tsentence\tclient_id\na.mp3\tShe said "no\tanna\n', "reference")
    assert found == Prediction("a.mp3", reference='She said "no', speaker="anna")
    (found,) = read(tmp_path / "own.csv", "file;mine\na;good\n", hypothesis="mine")
    assert found == Prediction("a", hypothesis="good")
    for content, reason in [
        ("id,hypothesis\na,b,c\n", "line 2 has another number of fields"),
        ("id,words\na,b\n", r"no text among id, words: name its column as columns.hypothesis=NAME"),
        ("clip,hypothesis\na,b\n", r"no id among clip, hypothesis: name its column as columns.id=NAME"),
        ('id,hypothesis\na,"b\n', "is no CSV"),
    ]:
        with pytest.raises(DataError, match=reason):
            read(tmp_path / "bad.csv", content)


def test_segments_are_joined_by_their_times(tmp_path: Path) -> None:
    segments = [
        {"session_id": "m1", "speaker": "B", "start_time": "2.5", "end_time": 3, "words": "to you"},
        {"session_id": "m1", "speaker": "A", "start_time": 0.5, "end_time": 2, "words": "good morning"},
        {"session_id": "m2", "speaker": "A", "start_time": 0, "end_time": 2, "words": "hello"},
    ]
    assert read(tmp_path / "a.json", json.dumps(segments)) == [
        Prediction("m1", hypothesis="good morning to you"),
        Prediction("m2", hypothesis="hello", speaker="A"),
    ]
    stm = ";; comment\nm1 A anna 2.0 3.0 <o,f0> to you\nm1 A anna 0.0 2.0 good morning\n"
    stm += "m1 A x 3 4 IGNORE_TIME_SEGMENT_IN_SCORING\nm2 A b 0 1 left\nm2 B b 0 1 right\n"
    assert [(one.id, one.reference) for one in read(tmp_path / "a.stm", stm, "reference")] == [
        ("m1", "good morning to you"),
        ("m2-A", "left"),
        ("m2-B", "right"),
    ]
    (found,) = read(tmp_path / "a.ctm", "m1 A 0.5 0.25 morning 0.5\nm1 A 0.0 0.5 good NA\n")
    assert found.hypothesis == "good morning"
    assert found.words == (PredictedWord("good", 0.0, 0.5), PredictedWord("morning", 0.5, 0.75, 0.5))


def test_lines_of_text_are_read(tmp_path: Path) -> None:
    trn = "good { morning / evening } { @ / uh } anna (anna-01)\r\n(anna-02)\n"
    assert read(tmp_path / "a.trn", trn) == [
        Prediction("anna-01", hypothesis="good morning anna"),
        Prediction("anna-02", hypothesis=""),
    ]
    assert read(tmp_path / "text", "a good morning\nb\nc\tgood bye\n", "reference") == [
        Prediction("a", reference="good morning"),
        Prediction("b", reference=""),
        Prediction("c", reference="good bye"),
    ]
    with pytest.raises(DataError, match="line 1 does not end in an id"):
        read(tmp_path / "a.trn", "good morning")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for location, reason in [
        (str(tmp_path / "*.nothing"), "there is no such file"),
        (str(tmp_path), "nor one of"),
        ("s3://bucket/a.jsonl", "copy the file here"),
    ]:
        with pytest.raises(DataError, match=reason):
            list(read_texts(location, "reference"))
    (tmp_path / "latin.jsonl").write_bytes("été".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot be read .*: give a text file in UTF-8"):
        list(read_texts(str(tmp_path / "latin.jsonl"), "reference"))
    for name, content, reason in [
        ("a.jsonl", " \n", "is empty"),
        ("a.json", "[{]", "is no JSON"),
        ("a.json", "[5]", "object 1 is a int, wants an object"),
        ("a.jsonl", '{"id": "a", "text": "b"}\n{"id"', "line 2 is no JSON"),
        ("a.stm", "m1 A anna 2.0", "line 1 has 4 fields"),
        ("a.ctm", "m1 A then 0.5 word", "'then' is no number"),
        ("a.json", '[{"session_id": "a", "words": ["b"]}]', "segment 1: words is"),
    ]:
        with pytest.raises(DataError, match=reason):
            read(tmp_path / name, content)
