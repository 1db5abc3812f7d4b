"""Test opening stages and grafts: the trained instructions in stage.json reach model, processor and merged graft."""

import json
import platform
import shutil
from pathlib import Path

import pytest

from graft.checkpoints.loading import (
    STAGE_FILE,
    computes_bf16,
    open_graft,
    open_processor,
    read_stage,
    write_stage,
)
from graft.errors import ModelError
from graft.model.configuration import GraftConfig
from graft.processor import GraftProcessor
from jobs.merge import MergeRecipe, run
from tests.support import tiny_models
from tests.support.adapters import save_projector

WORDS = {"styles": ["formatted", "raw"], "context": True}


@pytest.fixture
def graft(tmp_path):
    return tiny_models.save_tiny_graft(tmp_path / "graft")


def stage_on(graft, folder, words):
    model, _ = open_graft(graft)
    folder.mkdir()
    save_projector(model, folder)
    write_stage(folder, stage=1, graft=graft, words=words)
    return folder


def trained_for(path) -> tuple[list[str], bool]:
    """Return the trained styles and whether context was trained; model, processor and processor alone must agree."""
    model, processor = open_graft(path)
    alone = open_processor(path)
    found = [(list(one.trained_styles), one.trained_context) for one in (model.config, processor, alone)]
    assert found == found[:1] * 3
    return found[0]


def test_a_new_graft_has_no_trained_instructions(graft):
    assert trained_for(graft) == ([], False)
    assert GraftConfig().trained_styles == []


def test_a_stages_words_reach_the_merged_graft(graft, tmp_path):
    stage = stage_on(graft, tmp_path / "stage", WORDS)
    assert read_stage(stage) == {"stage": 1, "graft": "../graft", "words": WORDS}
    assert trained_for(stage) == (["formatted", "raw"], True)
    run(MergeRecipe(model=str(stage), out=str(tmp_path / "merged")))
    shutil.rmtree(graft)
    assert trained_for(tmp_path / "merged") == (["formatted", "raw"], True)
    assert GraftProcessor.from_pretrained(tmp_path / "merged").trained_styles == ["formatted", "raw"]

    # A stage on top of it may record its own instructions, or keep those of its graft.
    assert trained_for(stage_on(tmp_path / "merged", tmp_path / "same", None)) == (["formatted", "raw"], True)
    assert trained_for(stage_on(tmp_path / "merged", tmp_path / "none", {"styles": [], "context": False})) == (
        [],
        False,
    )


def test_a_stage_file_without_instructions_keeps_the_grafts(graft, tmp_path):
    stage = stage_on(graft, tmp_path / "stage", None)
    assert json.loads((stage / STAGE_FILE).read_text()) == {"stage": 1, "graft": "../graft"}
    assert trained_for(stage) == ([], False)


def test_an_unknown_style_and_a_folder_that_is_no_graft_are_refused(tmp_path):
    with pytest.raises(ValueError, match="trained_styles holds upper, not one of raw, lower, formatted"):
        GraftConfig(trained_styles=["upper"])
    with pytest.raises(ModelError, match=r"config\.json"):
        open_processor(tmp_path)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of other processors have other names")
def test_bf16_is_fast_where_the_processor_says_so():
    flags = next(line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    assert computes_bf16("cpu") == ({"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags))
