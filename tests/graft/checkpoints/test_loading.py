"""Test opening stages and grafts: the trained instructions in stage.json reach model, processor and merged graft."""

import json
import shutil
from pathlib import Path

import pytest
from transformers.utils import logging

from graft.checkpoints.loading import (
    STAGE_FILE,
    multiplies_bf16,
    open_graft,
    open_processor,
    read_stage,
    write_stage,
)
from graft.errors import ModelError
from graft.model.configuration import GraftConfig
from graft.model.modeling import GraftForConditionalGeneration
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


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="the flags are read as Linux shows them")
def test_bf16_is_chosen_where_the_processor_multiplies_it():
    """Linux names Arm's flag `bf16` and those of x86 as torch does."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line.split() for line in lines if line.startswith(("flags", "Features")))
    assert multiplies_bf16("cpu") is bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bw": True, "avx512_vl": True, "avx512_dq": True}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
    ],
)
def test_avx512_alone_does_not_multiply_bf16(monkeypatch, capabilities, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert multiplies_bf16("cpu") is expected


def test_a_library_call_draws_no_bar_of_loading_weights(graft, monkeypatch, capfd):
    monkeypatch.setattr(logging, "_tqdm_active", True)  # the tests, like commands, switch bars off
    open_graft(graft)
    assert capfd.readouterr().err == ""
    assert logging._tqdm_hook is None
    GraftForConditionalGeneration.from_pretrained(graft)
    assert "Loading weights" in capfd.readouterr().err
