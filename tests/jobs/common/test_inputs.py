"""Files that are named in full and missing end a command before it starts; what may be elsewhere is left to it."""

import pytest

from graft.errors import DataError
from jobs.common.inputs import check_inputs
from jobs.prepare import PrepareRecipe
from jobs.stage1 import Stage1Recipe
from jobs.stage2 import Stage2Recipe
from jobs.transcribe import TranscribeRecipe


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "merged").mkdir(parents=True)
    (tmp_path / "sub").mkdir()
    for name in ("talk.flac", "Smith, John.wav", "a [1].wav", "sub/b.wav"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "audio",
    [
        *("talk.flac", "runs", "*.mp3", "sub/[ab].wav", "a [1].wav", "Smith, John.wav", "./talk.flac"),
        *("s3://bucket/a.wav", "https://host/a.wav", "hf://datasets/a/b@main/c"),
        ["talk.flac", "runs"],
    ],
)
def test_what_exists_or_may_be_elsewhere_passes(audio):
    check_inputs(TranscribeRecipe(model="small", audio=audio))


@pytest.mark.parametrize("model", ["small", "openai/whisper-base", "runs/merged", "fast-7b"])
def test_a_model_may_be_a_hub_id_or_a_name(model):
    check_inputs(TranscribeRecipe(model=model, audio="talk.flac"))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (TranscribeRecipe(model="small", audio="tlak.flac"), "audio=tlak.flac (did you mean talk.flac?)"),
        (TranscribeRecipe(model="runs/mergd", audio="talk.flac"), "model=runs/mergd (did you mean runs/merged?)"),
        (TranscribeRecipe(model="./small", audio="talk.flac"), "model=./small"),
        (TranscribeRecipe(model="a/b/c", audio="talk.flac"), "model=a/b/c (there is no folder a)"),
        (TranscribeRecipe(model="small", audio="file:///none.flac"), "audio=file:///none.flac"),
        (TranscribeRecipe(model="small", audio="a[1].wav"), "audio=a[1].wav (did you mean a [1].wav?)"),
        (
            TranscribeRecipe(model="small", audio=["Smith", "John.wav"]),
            'audio=Smith, audio=John.wav (did you mean Smith, John.wav?); write audio=["Smith, John.wav"]',
        ),
        (PrepareRecipe(sources=["run/a.jsonl"], out="o"), "sources=run/a.jsonl (did you mean runs?)"),
        (Stage1Recipe(model="m", data=["s3://b/c", {"files": "none"}], out="o"), "data.files=none"),
        (
            Stage2Recipe(model="m", data="x", projector="p", validation={"data": "y"}, out="o"),
            "data=x, validation.data=y, projector=p",
        ),
    ],
)
def test_all_missing_files_are_named_at_once(recipe, message):
    with pytest.raises(DataError, match=r"^no such file or folder: ") as caught:
        check_inputs(recipe)
    assert message in str(caught.value)


def test_a_long_list_of_missing_files_is_cut():
    with pytest.raises(DataError, match=r"audio=none9.flac, 90 more$"):
        check_inputs(TranscribeRecipe(audio=[f"none{number}.flac" for number in range(100)]))
