"""Test the check that vision is kept: the same bits before stage 2, a number afterwards, or why there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import Qwen2VLImageProcessor

from graft.checkpoints.loading import open_graft
from jobs.build import BuildRecipe
from jobs.build import run as build
from jobs.evaluation.vision_check import ask_about_pictures, check_vision, find_vision_base, make_pictures
from jobs.transcription.pipeline import Workers
from tests.support import tiny_models


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "qwen2vl"
    tiny_models.save_text_base(folder)
    Qwen2VLImageProcessor(patch_size=4, min_pixels=16 * 16, max_pixels=32 * 32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def built(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("grafts")
    whisper = tiny_models.save_audio_base(folder / "whisper")
    build(BuildRecipe(audio_base=whisper, text_base=base, out=str(folder / "graft")))
    return str(folder / "graft")


def test_a_graft_that_was_just_built_gives_the_bits_of_its_base(built: str, base: str) -> None:
    found = check_vision(built, None, pictures=4)
    assert (found["ok"], found["is_identical"], found["largest_difference"]) == (True, True, 0.0)
    assert (found["equal_answers"], found["token_agreement"], found["pictures"]) == (1.0, 1.0, 4)
    assert "bit for bit" in found["verdict"]
    assert find_vision_base(built) == base


def test_a_changed_language_model_is_measured(built: str, base: str, tmp_path: Path) -> None:
    model, processor = open_graft(built)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.model.language_model.parameters():
            weight += 0.5 * weight.std() * torch.randn_like(weight) if weight.ndim > 1 else 0
    model.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "recipe.yaml").write_text(yaml.safe_dump({"model": built}))
    found = check_vision(str(tmp_path / "merged"), None, pictures=3)
    assert not found["is_identical"]
    assert found["largest_difference"] > 0
    assert found["token_agreement"] < 1
    assert found["ok"] is (found["token_agreement"] >= 0.8)
    assert "on 3 generated pictures" in found["verdict"].lower()


def test_what_cannot_be_checked_is_said(built: str, tmp_path: Path) -> None:
    model, processor = open_graft(built)
    model.save_pretrained(tmp_path / "graft")
    processor.save_pretrained(tmp_path / "graft")
    found = check_vision(str(tmp_path / "graft"), None, pictures=1)
    assert (found["ok"], found["verdict"]) == (
        None,
        "Vision was not checked: the model's folder does not say which Qwen2-VL it was built on: give vision_base.",
    )
    assert find_vision_base("small") == "bundled"


def test_pictures_follow_from_the_seed() -> None:
    first, again, other = (make_pictures(4, seed) for seed in (0, 0, 1))
    for (picture, question), (same, asked) in zip(first, again, strict=True):
        np.testing.assert_array_equal(picture, same)
        assert question == asked
        assert picture.shape == (168, 168, 3)
        assert picture.std() > 10
    assert not np.array_equal(np.stack([one for one, _ in first]), np.stack([one for one, _ in other]))


@pytest.mark.ray
def test_pictures_that_a_model_does_not_take_cost_no_evaluation(built: str, ray_started: None, tmp_path: Path) -> None:
    model, processor = open_graft(built)
    processor.image_processor.patch_size = 8  # the vision tower has patches of 4
    model.save_pretrained(tmp_path / "graft")
    processor.save_pretrained(tmp_path / "graft")
    base = find_vision_base(built)
    workers = Workers(1, 1, 1, 0.0, 1)
    found = ask_about_pictures(str(tmp_path / "graft"), base, pictures=1, seed=0, workers=workers)
    assert found["ok"] is None
    assert found["verdict"].startswith("Vision was not checked: asking about pictures failed (")
    assert "\n" not in found["verdict"]
    assert len(found["verdict"]) < 300
