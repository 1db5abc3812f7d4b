"""Tests that an output folder belongs to one recipe and appears only when it is complete."""

import os
import re
import subprocess
import sys

import pytest

from graft.config import Recipe
from graft.errors import OutputError
from jobs.common.outputs import claim_output, holds_results, staged_output
from tests.support.paths import ROOT


class Group(Recipe):
    lr: float = 1e-5


class Job(Recipe):
    seed: int = 0
    group: Group = Group()
    workers: int = 1


class Other(Recipe):
    name: str = "x"


def test_a_folder_belongs_to_the_recipe_that_claimed_it(tmp_path):
    out = str(tmp_path / "deep" / "out")
    folder = claim_output(out, Job())
    (folder / "result").write_text("kept")
    assert claim_output(out, Job()) == folder
    assert holds_results(out, Job())
    with pytest.raises(
        OutputError, match=rf"output {out} .*: group.lr was 1e-05 there and is 0.5 now: choose another out= or remove"
    ):
        claim_output(out, Job(group=Group(lr=0.5)))
    with pytest.raises(OutputError, match="name was absent there and is 'x' now"):
        claim_output(out, Other())
    assert (folder / "result").read_text() == "kept"
    assert claim_output(out, Job(workers=4), ignore=frozenset({"workers"})) == folder
    assert not holds_results(str(tmp_path / "none"), Job())


def test_no_secret_of_a_uri_is_kept_or_shown(tmp_path):
    out, uri = str(tmp_path / "out"), "s3://KEY:SECRET@bucket/name?endpoint_override=host:9000"
    folder = claim_output(out, Other(name=uri))
    assert (folder / "recipe.yaml").read_text() == "name: s3://bucket/name?endpoint_override=host:9000\n"
    assert holds_results(out, Other(name=uri.replace("SECRET", "ANOTHER")))
    with pytest.raises(OutputError) as caught:
        claim_output(out, Other(name=uri.replace("bucket", "other")))
    assert "SECRET" not in str(caught.value)


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "./", "..", "deep/..", str(tmp_path / "here")):
        message = rf"^output {re.escape(out)} (is the working folder, or holds it, .*: choose another out=|exists: )"
        with pytest.raises(OutputError, match=message), staged_output(out, Job()):
            pass
    assert not list((tmp_path / "here").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_what_is_said_in_other_words_is_the_same_recipe(tmp_path, monkeypatch):
    class Calls(Recipe):
        audio: str | list[str]
        aligner: str | None = None

    monkeypatch.chdir(tmp_path)
    (tmp_path / "calls").mkdir()
    claim_output("out", Calls(audio="calls"))
    for same in ("calls/", "./calls", str(tmp_path / "calls"), ["calls"], ["calls/"]):
        assert holds_results("out", Calls(audio=same))
    for other in ("more", ["calls", "calls"], "calls/a"):
        with pytest.raises(OutputError, match="audio was 'calls' there and is "):
            holds_results("out", Calls(audio=other))
    with pytest.raises(OutputError, match="aligner was null there and is 'whisper' now"):
        holds_results("out", Calls(audio="calls", aligner="whisper"))


def test_a_key_that_an_earlier_version_did_not_know_had_its_default(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 0\ngroup: {}\n")
    assert holds_results(str(tmp_path), Job())
    with pytest.raises(OutputError, match=r"workers was 1 there and is 2 now"):
        holds_results(str(tmp_path), Job(workers=2))
    with pytest.raises(OutputError, match=r"group\.lr was 1e-05 there and is 0\.5 now"):
        holds_results(str(tmp_path), Job(group=Group(lr=0.5)))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", ""])
def test_a_folder_with_a_broken_recipe_is_refused(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(OutputError, match=r"its recipe\.yaml is not"):
        claim_output(str(tmp_path), Job())


def test_a_file_in_the_way_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ["file", "file/below"]:
        with pytest.raises(OutputError, match="cannot be written"):
            claim_output(str(tmp_path / out), Job())
    with pytest.raises(OutputError, match="exists"), staged_output(str(tmp_path / "file"), Job()):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bucket_is_no_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="output s3://bucket/out is no path: give a folder that every node sees"):
        claim_output("s3://bucket/out", Job())
    with pytest.raises(OutputError, match="no path"), staged_output("s3://bucket/out", Job()):
        pass
    assert not list(tmp_path.iterdir())


def test_staged_output_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    stage = staged_output(str(out), Job())
    (stage.__enter__() / "half").write_text("half")
    assert not stage.__exit__(RuntimeError, RuntimeError(), None)
    assert os.listdir(tmp_path) == []
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "left by a killed run").touch()
    with staged_output(str(out), Job()) as folder:
        (folder / "part").write_text("whole")
        assert not out.exists()
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(out)) == ["part", "recipe.yaml"]
    assert holds_results(str(out), Job())


KILLED = """
import os
from graft.config import Recipe
from jobs.common.outputs import staged_output

with staged_output("out", Recipe()) as folder:
    (folder / "half").touch()
    os._exit(0)
"""


@pytest.mark.processes
def test_a_killed_run_leaves_nothing_that_the_next_one_does_not_remove(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, check=True)
    assert sorted(os.listdir(tmp_path)) == [".out.lock-1", ".out.partial"]
    with staged_output(str(tmp_path / "out"), Job()) as folder:
        (folder / "whole").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["recipe.yaml", "whole"]


def test_staged_output_never_touches_a_folder_in_use(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputError, match="exists"), staged_output(str(tmp_path), Job()):
        pass
    assert os.listdir(tmp_path) == ["notes"]
