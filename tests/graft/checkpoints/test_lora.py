"""Test adapters: PEFT's format, errors for another graft's adapters, truncation, and merging with equal logits."""

import json
import re
from pathlib import Path

import pytest
import torch

from graft.checkpoints.loading import multiplies_bf16, open_graft, write_stage
from graft.checkpoints.lora import (
    ADAPTER_FILES,
    LoraSettings,
    attach_adapters,
    merge_adapters,
    read_adapters,
    save_adapters,
    truncate_adapters,
)
from graft.errors import ModelError
from graft.training.backends import eval_mode
from jobs.common.cli import run_job
from jobs.merge import ADAPTER_FOLDER, MergeRecipe, run
from tests.support import tiny_models
from tests.support.adapters import SETTINGS, adapt, largest_difference, logits, save_projector, save_tiny_adapters
from tests.support.speech_corpus import BROKEN, corpus, row


@pytest.mark.seconds
def test_merged_equals_attached():
    plain = logits(tiny_models.graft_model())
    model = adapt(tiny_models.graft_model())
    attached = logits(model)
    assert largest_difference(attached, plain) > 1e-2
    merge_adapters(model)
    assert largest_difference(logits(model), attached) < 1e-5
    assert model.state_dict().keys() == tiny_models.graft_model().state_dict().keys()


def test_saved_and_attached_again_is_exact(tmp_path):
    model = adapt(tiny_models.graft_model())
    save_tiny_adapters(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ADAPTER_FILES)
    other = tiny_models.graft_model()
    attach_adapters(other, tmp_path)
    assert torch.equal(logits(other.eval()), logits(model))
    assert {name for name, parameter in other.named_parameters() if parameter.requires_grad} == {
        name for name, _ in other.named_parameters() if "lora_" in name
    }


def test_peft_loads_the_files(tmp_path):
    from peft import PeftModel

    model = adapt(tiny_models.graft_model())
    save_tiny_adapters(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_models.graft_model(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"intermediate_size": 96}], ids=["deeper", "wider"])
def test_adapters_of_another_graft_are_refused(tmp_path, change):
    save_tiny_adapters(adapt(tiny_models.graft_model()), tmp_path)
    text = tiny_models.qwen2vl_config().to_dict()["text_config"] | change
    if "num_hidden_layers" in change:
        text.pop("layer_types", None)
    with pytest.raises(ModelError, match="do not fit this graft") as caught:
        attach_adapters(tiny_models.graft_model(text_config=text), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("adapter_model.safetensors", b"\x10"), ("adapter_config.json", b"{")])
def test_cut_off_files_are_refused(tmp_path, name, content):
    save_tiny_adapters(adapt(tiny_models.graft_model()), tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match="can't be read") as caught:
        attach_adapters(tiny_models.graft_model(), tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_adapters_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"holds no adapters \(adapter_config\.json, adapter_model\.safetensors\)"):
        attach_adapters(tiny_models.graft_model(), tmp_path)


def deltas(state: dict[str, torch.Tensor], settings: LoraSettings) -> dict[str, torch.Tensor]:
    """Compute the updates that adapters add to their matrices."""
    matrices = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    scale = settings.alpha / settings.rank
    return {name: scale * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] for name in matrices}


@pytest.mark.parametrize("encoder", [False, True], ids=["language", "encoder"])
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_truncated_adapters_are_the_best_of_their_rank(tmp_path, rank, encoder):
    settings = LoraSettings(rank=4, alpha=12, encoder=encoder)
    save_adapters(dict(adapt(tiny_models.graft_model(), settings).named_parameters()), settings, tmp_path)
    before, config = read_adapters(tmp_path)
    after, cut, kept = truncate_adapters(before, settings, rank)
    assert (config.r, cut.rank, cut.alpha, cut.encoder) == (4, min(rank, 4), cut.rank, encoder)
    assert after.keys() == before.keys()
    whole, found = deltas(before, settings), deltas(after, cut)
    assert kept.keys() == whole.keys()
    assert len(whole) == 14 + 12 * encoder
    for name, delta in whole.items():
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert largest_difference(found[name], best) < 1e-5
        assert largest_difference(found[name], delta) < 1e-5 or rank < 4
        assert kept[name] == pytest.approx(float(best.square().sum() / delta.square().sum()), abs=1e-5)
        a, b = (after[f"{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_truncated_adapters_can_be_attached(tmp_path):
    model = adapt(tiny_models.graft_model())
    state, settings, _ = truncate_adapters(
        {name.replace(".default.", "."): one for name, one in lora(model).items()}, SETTINGS, 4
    )
    save_adapters(state, settings, tmp_path)
    other = tiny_models.graft_model()
    attach_adapters(other, tmp_path)
    assert largest_difference(logits(other.eval()), logits(model)) < 1e-5


def lora(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}


def test_untrained_adapters_and_those_wider_than_their_matrix_are_truncated():
    a, zero = torch.randn(6, 8), torch.zeros(3, 6)
    names = ("m.lora_A.weight", "m.lora_B.weight")
    for b in (zero, torch.randn(3, 6)):
        state = dict(zip(names, (a, b), strict=True))
        settings = LoraSettings(rank=6, alpha=6)
        after, cut, kept = truncate_adapters(state, settings, 5)
        assert [tuple(after[name].shape) for name in names] == [(5, 8), (3, 5)]
        assert largest_difference(deltas(after, cut)["m"], b @ a) < 1e-5
        assert kept == {"m": pytest.approx(1.0)}


def test_rounding_to_nf4_equals_quantizing_and_dequantizing(stage):
    pytest.importorskip("bitsandbytes")
    quantized, _ = open_graft(stage.parent / "graft", dtype=torch.float32, nf4=True)
    rounded, _ = open_graft(stage.parent / "graft", dtype=torch.float32, rounded_to_nf4=True)
    expected = quantized.dequantize(dtype=torch.float32).state_dict()
    assert expected.keys() == rounded.state_dict().keys()
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """Make the output folder of a stage 2, next to its graft."""
    folder = tmp_path_factory.mktemp("adapters")
    model, _ = open_graft(tiny_models.save_tiny_graft(folder / "graft", width=64))
    stage = folder / "stage2"
    stage.mkdir()
    model.audio_projector.linear.weight.data.mul_(2)
    save_tiny_adapters(adapt(model), stage)
    save_projector(model, stage)
    write_stage(stage, stage=2, graft=folder / "graft")
    return stage


def test_a_stages_output_opens_on_its_graft(stage, monkeypatch):
    model, _ = open_graft(stage)
    base, _ = open_graft(stage.parent / "graft")
    assert torch.equal(model.audio_projector.linear.weight, base.audio_projector.linear.weight * 2)
    base.audio_projector.linear.weight.data.mul_(2)
    assert torch.equal(logits(adapt(base)), logits(model))
    monkeypatch.chdir(stage)  # a relative path means the same
    assert torch.equal(logits(open_graft(".")[0]), logits(model))


def test_adapters_are_not_merged_into_four_bits(stage):
    model, _ = open_graft(stage, dtype=torch.float32, nf4=True)
    with pytest.raises(ModelError, match="merged into full-precision weights, not into 4-bit ones"):
        merge_adapters(model)


def test_the_merge_job_writes_a_whole_graft_and_keeps_the_adapters(stage, tmp_path, capsys):
    def merge(*arguments: str) -> int:
        return run_job(MergeRecipe, run, summary="", argv=list(arguments))

    out = tmp_path / "merged"
    assert merge(f"model={stage}", f"out={out}") == 0
    model, processor = open_graft(out)
    assert largest_difference(logits(model), logits(open_graft(stage)[0])) < 1e-5
    assert processor.tokenizer.convert_tokens_to_ids("<|audio_pad|>") == model.config.audio_token_id
    assert sorted(path.name for path in (out / ADAPTER_FOLDER).iterdir()) == sorted(
        [*ADAPTER_FILES, "projector.safetensors"]
    )
    capsys.readouterr()
    assert merge(f"model={stage.parent / 'graft'}", f"out={tmp_path / 'no'}") == 2
    assert "is no stage's output (it has no stage.json)" in capsys.readouterr().err
    assert not list(tmp_path.glob("*no*"))


def test_merging_onto_rounded_weights_equals_the_adapters_on_nf4(stage, tmp_path):
    pytest.importorskip("bitsandbytes")
    assert (
        run_job(
            MergeRecipe,
            run,
            summary="",
            argv=[f"model={stage}", f"out={tmp_path / 'rounded'}", "onto=nf4", "dtype=fp32"],
        )
        == 0
    )
    assert run_job(MergeRecipe, run, summary="", argv=[f"model={stage}", f"out={tmp_path / 'full'}", "dtype=fp32"]) == 0
    quantized, _ = open_graft(stage, dtype=torch.float32, nf4=True)
    rounded, full = (logits(open_graft(tmp_path / name)[0]) for name in ("rounded", "full"))
    with eval_mode(quantized.train()):
        assert largest_difference(logits(quantized), rounded) < 1e-5
    assert largest_difference(full, rounded) > 1e-2
    plain, _ = open_graft(stage, dtype=torch.float32)
    assert largest_difference(logits(plain), full) < 1e-5


@pytest.mark.seconds
def test_all_ways_to_use_adapters_are_compared(stage, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    broken = row("broken", 9, **BROKEN)
    data = corpus(tmp_path / "clips.parquet", [broken])
    command = [f"model={stage}", f"out={tmp_path / 'merged'}", f"data={data}"]
    assert run_job(MergeRecipe, run, summary="", argv=command) == 2
    reason = "merged is merged, but not compared: none of 1 clips to compare on can be read, broken.flac: not readable"
    assert reason in capsys.readouterr().err
    weights = tmp_path / "merged" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    # The command's second run compares the merge that the first one left, on the clips that can be read.
    corpus(tmp_path / "clips.parquet", [broken, *(row(f"c{seed}", seed) for seed in range(3))])
    assert run_job(MergeRecipe, run, summary="", argv=command) == 0
    assert weights.stat().st_mtime_ns == written
    figures = json.loads((tmp_path / "merged" / "comparison.json").read_text())
    plain = "adapters on bfloat16" if multiplies_bf16("cpu") else "adapters on float32"
    assert list(figures) == ["adapters on NF4", plain, "merged"]
    assert all(4 < one["loss"] < 20 and one["wer"] > 0 for one in figures.values())
    assert figures["merged"]["loss"] == pytest.approx(figures[plain]["loss"], abs=0.02)
    out = capsys.readouterr().out
    assert all(re.search(rf"^{name} +3 ", out, re.MULTILINE) for name in figures)
    assert "merge: clip broken is left out of the comparison: broken.flac: not readable" in out
    assert run_job(MergeRecipe, run, summary="", argv=command) == 0
    assert "is done already" in capsys.readouterr().out
