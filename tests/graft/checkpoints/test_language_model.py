"""Test the split of a tiny graft: its language model as a plain Qwen2, and the rest, which makes embeddings."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from graft.checkpoints.language_model import language_model_folder, open_encoder_model
from graft.checkpoints.loading import open_graft, write_stage
from graft.errors import MissingExtra, ModelError, install_command
from tests.support import tiny_models
from tests.support.adapters import save_projector

FRAME_COUNTS = [60, 37]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.save_tiny_graft(tmp_path / "graft")


def inputs_for(model) -> dict[str, torch.Tensor]:
    features, frame_counts = tiny_models.log_mels(FRAME_COUNTS)
    ids, audio = [5, 6, 7], model.config.audio_token_id
    ids += [id for count in FRAME_COUNTS for id in [*[audio] * (((count + 1) // 2) // 2), 8, 9]]
    return {"input_ids": torch.tensor([ids]), "input_features": features, "audio_frame_counts": frame_counts}


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_is_a_plain_qwen2_with_the_same_logits(tmp_path: Path, shard_size: str, tied: bool) -> None:
    folder = tiny_models.save_tiny_graft(tmp_path / "graft", tie_word_embeddings=tied)
    graft, _ = open_graft(folder)
    graft.save_pretrained(folder, max_shard_size=shard_size)
    if shard_size != "1GB":
        (folder / "model.safetensors").unlink()
        assert len(list(folder.glob("*.safetensors"))) > 3
    plain = AutoModelForCausalLM.from_pretrained(language_model_folder(folder, tmp_path / "cache"))
    assert type(plain) is Qwen2ForCausalLM
    assert plain.config.tie_word_embeddings is tied
    ids = torch.tensor([[5, 200, 17, 42, 42]])
    with torch.inference_mode():
        assert torch.equal(plain(input_ids=ids).logits, graft(input_ids=ids).logits)
        inputs = inputs_for(graft)
        assert torch.equal(plain(inputs_embeds=graft.embed(**inputs)).logits, graft(**inputs).logits)


def test_the_language_model_is_written_once_for_each_graft(tmp_path: Path, folder: Path) -> None:
    cache = tmp_path / "cache"
    written = language_model_folder(folder, cache)
    first = (written / "config.json").stat().st_mtime_ns
    assert language_model_folder(folder, cache) == written
    assert (written / "config.json").stat().st_mtime_ns == first
    names = load_file(written / "model.safetensors")
    assert json.loads((written / "model.safetensors.index.json").read_text())["weight_map"].keys() == names.keys()
    assert all(
        name == "lm_head.weight" or name.startswith(("model.layers.", "model.norm.", "model.embed_tokens."))
        for name in names
    )
    other = language_model_folder(tiny_models.save_tiny_graft(tmp_path / "other", seed=1), cache)
    assert other != written
    assert {path.name for path in written.parent.iterdir()} == {
        one.name + end for one in (written, other) for end in ("", ".lock")
    }


def test_a_cache_that_cannot_be_written_is_an_error_with_its_remedy(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match=r"can't be written .*set GRAFT_CACHE to a folder with 0\.0 GB free"):
        language_model_folder(folder, tmp_path / "cache")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_encoder_model_embeds_as_the_graft_does_and_holds_no_layers(
    folder: Path, dtype: torch.dtype | None
) -> None:
    graft, _ = open_graft(folder, dtype=dtype)
    encoder_model, processor = open_encoder_model(folder, dtype=dtype)
    assert torch.equal(encoder_model.embed(**inputs_for(encoder_model)), graft.embed(**inputs_for(graft)))
    assert encoder_model.generation_config.suppress_tokens == graft.generation_config.suppress_tokens
    assert all(parameter.is_meta for parameter in encoder_model.model.language_model.layers.parameters())
    assert processor.tokenizer.eos_token == "<|im_end|>"


def test_a_stages_projector_is_loaded_into_its_graft(tmp_path: Path, folder: Path) -> None:
    graft, _ = open_graft(folder)
    torch.nn.init.normal_(graft.audio_projector.linear.weight)
    (tmp_path / "stage1").mkdir()
    save_projector(graft, tmp_path / "stage1")
    write_stage(tmp_path / "stage1", stage=1, graft=folder)
    encoder_model, _ = open_encoder_model(tmp_path / "stage1")
    assert torch.equal(encoder_model.embed(**inputs_for(encoder_model)), graft.embed(**inputs_for(graft)))
    assert language_model_folder(tmp_path / "stage1", tmp_path / "cache") == language_model_folder(
        folder, tmp_path / "cache"
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "stage1" / name).touch()
    with pytest.raises(ModelError, match=r"not merged: merge them \(`graft merge`\)"):
        open_encoder_model(tmp_path / "stage1")


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="qwen2_vl"):
        open_encoder_model(tiny_models.save_text_base(tmp_path / "text"))


def test_without_vllm_its_engine_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graft.inference.engines.vllm_engine import open_vllm_engine

    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(MissingExtra, match=re.escape(install_command("vllm"))):
        open_vllm_engine(folder, device="cpu")
