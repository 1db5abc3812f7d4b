"""Test the import of the reference system's checkpoints, made here in their format: equal logits, no tensor ignored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.checkpoints.import_reference import SETTINGS, import_reference
from graft.checkpoints.loading import open_graft
from graft.errors import ModelError
from graft.model.configuration import GraftConfig
from graft.model.modeling import GraftForConditionalGeneration
from graft.model.tokens import AUDIO_TOKENS
from jobs.build import BuildRecipe, run
from jobs.common.cli import run_job
from tests.support import tiny_models

NAMES = {
    "model.language_model.": "model.",
    "model.visual.": "visual.",
    "audio_tower.": "audio_encoder.",
    "audio_projector.linear.": "audio_projector.",
}
NOT_QUANTIZED = ("audio_encoder.", "audio_projector.")


def source(mel_count: int = 80) -> tuple[GraftForConditionalGeneration, Any]:
    """Make a graft like the reference system's, and its tokenizer."""
    words = tiny_models.tokenizer()
    base = tiny_models.qwen2vl_config().to_dict()
    base.pop("model_type")
    base["text_config"] |= {"vocab_size": len(words) + 5, "hidden_size": 64, "eos_token_id": words.eos_token_id}
    base["text_config"]["rope_parameters"] |= {"mrope_section": [4, 2, 2]}
    base["vision_config"] |= {"hidden_size": 64}
    vision = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    audio = ("audio_token_id", "audio_start_token_id", "audio_end_token_id")
    ids = dict(
        zip((*vision, *audio), words.convert_tokens_to_ids([*tiny_models.VISION_TOKENS, *AUDIO_TOKENS]), strict=True)
    )
    shape = {"d_model": 128, "encoder_ffn_dim": 64}  # two heads of 64
    whisper = tiny_models.whisper_config(mel_count).to_dict() | shape
    torch.manual_seed(0)
    model = GraftForConditionalGeneration(GraftConfig(**{**base, **ids, **SETTINGS, "audio_config": whisper}))
    for parameter in model.audio_tower.parameters():
        parameter.data.normal_(std=0.1)
    return model.eval(), words


def flat_config(config: GraftConfig) -> dict[str, Any]:
    """Write the configuration as the reference system did with transformers 4.47: text keys at the top level."""
    text = config.text_config
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    ids = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id", "audio_token_id")
    rope = text.rope_parameters
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "transformers_version": "4.47.0.dev0",
        "torch_dtype": "float32",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 1,
            "embed_dim": 16,
            "num_heads": 2,
            "hidden_size": 64,
            "patch_size": 4,
        },
        "tie_word_embeddings": False,
        "audio_hidden_size": 128,
        "use_audio_encoder": True,
        "bos_token_id": 1,
        "eos_token_id": text.eos_token_id,
        "max_position_embeddings": text.max_position_embeddings,
        **{name: getattr(text, name) for name in names},
        **{name: getattr(config, name) for name in ids},
    }


def flat_state(model: GraftForConditionalGeneration) -> dict[str, Tensor]:
    state = {}
    for name, tensor in model.state_dict().items():
        prefix = next((prefix for prefix in NAMES if name.startswith(prefix)), "")
        state[NAMES.get(prefix, "") + name.removeprefix(prefix)] = tensor.clone()
    return state


def save(folder: Path, model: GraftForConditionalGeneration, words: Any, state: dict[str, Tensor] | None = None) -> str:
    """Write a checkpoint in two shards, as it is published."""
    folder.mkdir()
    state = flat_state(model) if state is None else state
    shards = {f"model-0000{number}-of-00002.safetensors": sorted(state)[number - 1 :: 2] for number in (1, 2)}
    for name, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(flat_config(model.config)))
    words.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model: GraftForConditionalGeneration) -> Tensor:
    features, counts = tiny_models.log_mels([300])
    ids = torch.tensor([[5, 6, *[model.config.audio_token_id] * 1500, 7, 8, 9]])
    return model(input_ids=ids, input_features=features, audio_frame_counts=counts).logits


def quantized(state: dict[str, Tensor], *, nested: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Quantize a state's matrices with bitsandbytes, head and vision tower included.

    Returns the quantized state and the same state as bitsandbytes dequantizes it.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    stored, exact = dict(state), dict(state)
    for name, tensor in state.items():
        if not name.endswith(".weight") or tensor.ndim != 2 or "embed_tokens" in name or name.startswith(NOT_QUANTIZED):
            continue
        layer = bitsandbytes.nn.Linear4bit(*tensor.shape[::-1], bias=False)
        layer.weight = bitsandbytes.nn.Params4bit(
            tensor, requires_grad=False, compress_statistics=nested, quant_type="nf4"
        )
        layer = layer.to("cpu")
        stored |= {name.removesuffix("weight") + key: value for key, value in layer.state_dict().items()}
        exact[name] = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return stored, exact


def loaded(model: GraftForConditionalGeneration, state: dict[str, Tensor]) -> GraftForConditionalGeneration:
    names = {published: own for own, published in NAMES.items()}
    mine = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        mine[names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    model.load_state_dict(mine)
    return model


def test_a_published_checkpoint_has_the_logits_of_its_source(tmp_path):
    model, words = source()
    imported, processor = import_reference(save(tmp_path / "published", model, words))
    assert torch.equal(logits(imported), logits(model))
    assert imported.state_dict().keys() == model.state_dict().keys()
    for name, value in SETTINGS.items():
        assert getattr(imported.config, name) == getattr(model.config, name) == value
        assert name == "audio_projector" or getattr(processor, name) == value
    assert imported.config.audio_config.encoder_attention_heads == 2
    assert imported.config.text_config.rope_parameters["mrope_section"] == [4, 2, 2]
    assert {imported.config.audio_token_id, imported.config.image_token_id} < set(
        imported.generation_config.suppress_tokens
    )
    assert imported.generation_config.eos_token_id == words.eos_token_id
    assert len(processor.prompt_ids(100)) - len(processor.prompt_ids(3000)) == 0


@pytest.mark.seconds
@pytest.mark.parametrize("nested", [True, False])
def test_matrices_quantized_by_bitsandbytes_are_dequantized(tmp_path, nested):
    model, words = source()
    stored, exact = quantized(flat_state(model), nested=nested)
    assert stored["lm_head.weight"].dtype == torch.uint8
    # Seven matrices in each of two layers, the head, and six in the vision tower.
    assert len([name for name in stored if ".quant_state." in name]) == 2 * 7 + 1 + 6
    plain = logits(model)
    imported, _ = import_reference(save(tmp_path / "published", model, words, stored))
    expected = logits(loaded(model, exact))
    assert torch.equal(logits(imported), expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_the_projector_may_be_in_a_file_of_its_own(tmp_path):
    model, words = source()
    state = flat_state(model)
    weight = state.pop("audio_projector.weight")
    alone = save(tmp_path / "alone", model, words, state)
    with pytest.raises(ModelError, match=r"lacks audio_projector\.weight"):
        import_reference(alone)
    torch.save({"weight": weight}, tmp_path / "alone" / "audio_projector.pt")
    assert torch.equal(logits(import_reference(alone)[0]), logits(model))
    twice = save(tmp_path / "twice", model, words)
    torch.save({"weight": weight}, tmp_path / "twice" / "audio_projector.pt")
    import_reference(twice)
    torch.save({"weight": 2 * weight}, tmp_path / "twice" / "audio_projector.pt")
    with pytest.raises(ModelError, match=r"differ in audio_projector\.weight"):
        import_reference(twice)


def test_the_features_have_as_many_mels_as_the_encoder_takes(tmp_path):
    model, processor = import_reference(save(tmp_path / "published", *source(mel_count=128)))
    assert processor.feature_extractor.feature_size == model.config.audio_config.num_mel_bins == 128


def changed(state: dict[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    rest = {key: value for key, value in state.items() if key != name}
    return rest if tensor is None else rest | {name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("audio_encoder.layers.1.fc2.bias", None, r"lacks audio_encoder\.layers\.1\.fc2\.bias: is it one"),
        ("visual.merger.mlp.0.weight", None, r"lacks visual\.merger\.mlp\.0\.weight"),
        ("model.embed_tokens.weight", None, r"lacks model\.embed_tokens\.weight"),
        ("audio_encoder.conv1.weight", None, r"lacks audio_encoder\.conv1\.weight"),
        ("audio_projector.bias", torch.zeros(64), r"has audio_projector\.bias, which a graft does not have"),
        ("decoder.weight", torch.zeros(2), r"decoder\.weight belongs to no part"),
        ("model.norm.weight", torch.ones(63), r"has model\.norm\.weight of shape \(63,\), not \(64,\)"),
        ("audio_projector.weight", torch.zeros(64, 128), r"audio_projector\.linear\.weight is all zeros"),
        ("lm_head.weight.absmax", torch.zeros(3), r"has lm_head\.weight\.absmax, which"),
        (
            "lm_head.weight.quant_state.bitsandbytes__nf4",
            torch.tensor([1], dtype=torch.uint8),
            r"the 4-bit lm_head\.weight can't be unpacked",
        ),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path, name, tensor, words):
    model, tokenizer = source()
    path = save(tmp_path / "published", model, tokenizer, changed(flat_state(model), name, tensor))
    with pytest.raises(ModelError, match=words) as caught:
        import_reference(path)
    assert "\n" not in str(caught.value)


def test_broken_files_are_named(tmp_path):
    model, words = source()
    path = Path(save(tmp_path / "published", model, words))
    (path / "audio_projector.pt").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"audio_projector\.pt can't be read"):
        import_reference(str(path))
    (path / "audio_projector.pt").unlink()
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors"):
        import_reference(str(path))
    with pytest.raises(ModelError, match="is no folder, and no hub answers"):
        import_reference("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        import_reference(str(tmp_path / "empty"))


def test_the_tokenizer_must_be_the_one_that_the_weights_know(tmp_path):
    model, words = source()
    path = Path(save(tmp_path / "published", model, words))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).unlink()
    with pytest.raises(ModelError, match="has no tokenizer: give text_base="):
        import_reference(str(path))
    words.save_pretrained(tmp_path / "words")
    assert torch.equal(logits(import_reference(str(path), tokenizer_base=str(tmp_path / "words"))[0]), logits(model))
    words.add_tokens(["<|one more|>"])
    other = tiny_models.tokenizer(audio=False)
    other.add_tokens(["<|one more|>"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="audio_token_id"):
        import_reference(str(path), tokenizer_base=str(tmp_path / "other"))


def test_the_build_job_writes_a_graft(tmp_path, capsys):
    model, words = source()
    path = save(tmp_path / "published", model, words)

    def build(*arguments: str) -> int:
        return run_job(
            BuildRecipe, run, summary="", argv=[f"reference={path}", f"out={tmp_path / 'graft'}", *arguments]
        )

    assert build("audio_pool=2") == 2
    assert "audio_pool=2 does not go with reference=" in capsys.readouterr().err
    assert build("audio_pool=1", "dtype=bf16") == 0
    opened, processor = open_graft(tmp_path / "graft", dtype=torch.float32)
    assert {tensor.dtype for tensor in load_file(tmp_path / "graft" / "model.safetensors").values()} == {torch.bfloat16}
    assert processor.prompt_style == "reference"
    torch.testing.assert_close(logits(opened), logits(model), atol=0.05, rtol=0.05)
    assert "audio_context: full" in (tmp_path / "graft" / "recipe.yaml").read_text()
