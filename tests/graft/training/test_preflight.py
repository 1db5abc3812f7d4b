"""Test the preflight: a model without a working audio path and a batch with prompt labels are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.checkpoints.loading import open_graft, write_stage
from graft.checkpoints.projector_file import check_projector, load_projector
from graft.errors import DataError, ModelError
from graft.training.preflight import check_labels, preflight, swap_audio
from jobs.check import CheckRecipe, run
from jobs.common.cli import run_job
from tests.support import tiny_models
from tests.support.adapters import save_projector
from tests.support.speech_corpus import corpus, row
from tests.support.training import example, filler, step_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("preflight") / "graft")


@pytest.fixture(scope="module")
def zeroed(tmp_path_factory) -> Path:
    """Make a graft whose projector is all zeros."""
    folder = tiny_models.save_tiny_graft(tmp_path_factory.mktemp("preflight") / "zeroed")
    state = load_file(folder / "model.safetensors")
    state["audio_projector.linear.weight"].zero_()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def opened(folder):
    return open_graft(folder)


def batch_of(processor, *seeds: int) -> dict[str, torch.Tensor]:
    return dict(step_batches(processor, [example(processor, seed) for seed in seeds])[0].inputs)


def check(*arguments: str) -> int:
    return run_job(CheckRecipe, run, summary="", argv=list(arguments))


@pytest.mark.parametrize("seeds", [(1, 2, 3), (4,)], ids=["batch", "single"])
def test_a_working_audio_path_and_answer_labels_pass(opened, seeds):
    model, processor = opened
    batch = batch_of(processor, *seeds)
    logit_change, label_count = preflight(model, batch, processor.prompt_end_ids())
    assert label_count == sum(len(example(processor, seed).target_ids) for seed in seeds)
    assert logit_change > 1e-4


def test_a_projector_of_zeros_is_refused_everywhere(opened, folder, zeroed, tmp_path):
    model, processor = opened
    model.audio_projector.linear.weight.data.zero_()
    with pytest.raises(ModelError, match=r"the audio path is dead: other audio changes the logits by 0\.0e\+00"):
        preflight(model, batch_of(processor, 1, 2), processor.prompt_end_ids())
    with pytest.raises(ModelError, match=r"here: audio_projector\.linear\.weight is all zeros, so audio has no effect"):
        check_projector(model.audio_projector.state_dict(), source="here")
    save_projector(model, tmp_path)
    write_stage(tmp_path, stage=1, graft=folder)
    for refuse in (lambda: load_projector(model, tmp_path), lambda: open_graft(tmp_path), lambda: open_graft(zeroed)):
        with pytest.raises(ModelError, match="all zeros, so audio has no effect"):
            refuse()


def test_a_projector_that_is_not_finite_is_refused(opened):
    model, _ = opened
    model.audio_projector.linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"audio_projector\.linear\.weight holds values that are not finite"):
        check_projector(model.audio_projector.state_dict(), source="here")


def test_an_encoder_of_zeros_is_refused(opened):
    model, processor = opened
    for parameter in model.audio_tower.parameters():
        parameter.data.zero_()
    with pytest.raises(ModelError, match="the audio path is dead"):
        preflight(model, batch_of(processor, 1, 2), processor.prompt_end_ids())


def test_labels_outside_the_answer_are_refused(opened):
    _, processor = opened
    end = processor.prompt_end_ids()
    batch = batch_of(processor, 1, 2, 3)
    ids, labels = batch["input_ids"], batch["labels"]
    first = int((labels[1] != -100).nonzero()[0])
    leak, gap, wrong = labels.clone(), labels.clone(), labels.clone()
    leak[1, first - 1] = ids[1, first - 1]
    gap[1, first + 1] = -100
    wrong[1, first] += 1
    with pytest.raises(DataError, match=rf"row 1: a prompt token is a label \(at {first - 1}\)"):
        check_labels(ids, leak, end)
    for broken in (gap, wrong):
        with pytest.raises(DataError, match="row 1: labels are not the answer's own ids"):
            check_labels(ids, broken, end)
    assert check_labels(ids, wrong, end, token_noise=True) == int((labels != -100).sum())
    for broken, words in (
        (leak, "a prompt token is a label"),
        (gap, "labels are not"),
        (labels.roll(-1, 1), "labels are not"),
    ):
        with pytest.raises(DataError, match=words):
            check_labels(ids, broken, end, token_noise=True)
    (masked,) = step_batches(processor, filler(processor))
    assert check_labels(masked.inputs["input_ids"], masked.inputs["labels"], end) == 0


def test_swapped_audio_has_the_next_clips_frames_and_the_own_length():
    features, counts = tiny_models.log_mels([10, 40])
    swapped = swap_audio(features, counts)
    assert torch.equal(swapped[0, :, :12], features[1, :, :12])
    assert torch.equal(swapped[1, :, :42], features[0, :, :10].repeat(1, 5)[:, :42])
    assert not swapped[0, :, 12:].any()
    single = swap_audio(features[:1], counts[:1])
    assert torch.equal(single[0, :, :10], features[0, :, :10].flip(-1))


def test_the_check_job_on_good_and_bad(folder, zeroed, tmp_path, capsys):
    data = corpus(tmp_path / "clips.parquet", [row(f"clip{seed}", seed) for seed in range(3)])
    assert check(f"model={folder}", f"data=[{data}]", "clips=2") == 0
    assert "hears: other audio changes the answer's logits" in capsys.readouterr().out
    unlabelled = corpus(tmp_path / "unlabelled.parquet", [row("clip0", 0, text=" ")])
    for model, source, words in [
        (zeroed, data, "audio has no effect"),
        (folder, unlabelled, "none of 1 rows can be trained on (1 no words)"),
    ]:
        assert check(f"model={model}", f"data=[{source}]") == 2
        errors = capsys.readouterr().err.strip()
        assert errors.startswith("graft: error: ")
        assert words in errors
        assert "\n" not in errors
