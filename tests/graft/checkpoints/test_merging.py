"""Test that a merge, tensor by tensor, equals that of the whole model, and takes the memory of one shard."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.checkpoints.loading import open_graft, write_stage
from graft.checkpoints.lora import LoraSettings, merge_adapters, save_adapters
from graft.checkpoints.merging import write_merged
from graft.errors import ModelError
from graft.model.modeling import GraftForConditionalGeneration
from tests.support import tiny_models
from tests.support.adapters import SETTINGS, adapt, save_projector
from tests.support.memory import peak_growth


def save_stage(folder: Path, model: GraftForConditionalGeneration, settings: LoraSettings = SETTINGS) -> Path:
    """Write the output folder of a stage 2 on the graft in `folder`."""
    stage = folder / "stage2"
    stage.mkdir()
    model.audio_projector.linear.weight.data.mul_(2)
    save_projector(model, stage)
    save_adapters(dict(adapt(model, settings).named_parameters()), settings, stage)
    write_stage(stage, stage=2, graft=folder / "graft")
    return stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merging")
    model, _ = open_graft(tiny_models.save_tiny_graft(folder / "graft", width=64))
    return save_stage(folder, model, LoraSettings(rank=4, alpha=8, encoder=True))


@pytest.mark.parametrize("onto_nf4", [False, True], ids=["full", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shards_equal_the_whole_model_bit_by_bit(stage: Path, tmp_path: Path, dtype, onto_nf4) -> None:
    if onto_nf4:
        pytest.importorskip("bitsandbytes")
    write_merged(stage, tmp_path, dtype=dtype, onto_nf4=onto_nf4, shard_bytes=100_000)
    model, processor = open_graft(stage, dtype=torch.float32, rounded_to_nf4=onto_nf4)
    merge_adapters(model)
    state: dict[str, torch.Tensor] = {}
    shards = sorted(tmp_path.glob("model-0*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        assert shard.stat().st_size <= 110_000
        state |= load_file(shard)
    expected = model.to(dtype).state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    merged, merged_processor = open_graft(tmp_path)
    assert merged.dtype == dtype
    assert torch.equal(merged.lm_head.weight, expected["lm_head.weight"])
    assert merged.generation_config.to_dict() == model.generation_config.to_dict()
    assert merged_processor.prompt_ids(40) == processor.prompt_ids(40)


def test_a_graft_that_lacks_tensors_is_not_merged(stage: Path, tmp_path: Path) -> None:
    graft = tiny_models.save_tiny_graft(tmp_path / "graft", width=64)
    state = load_file(graft / "model.safetensors")
    del state["model.language_model.norm.weight"]
    save_file(state, graft / "model.safetensors", metadata={"format": "pt"})
    again = save_stage(tmp_path, open_graft(stage.parent / "graft")[0])
    with pytest.raises(ModelError, match=r"lacks 1 tensors of a graft, model\.language_model\.norm\.weight first"):
        write_merged(again, tmp_path, dtype=torch.float32, onto_nf4=False)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process's peak of memory")
def test_a_merge_takes_the_memory_of_one_shard(tmp_path: Path) -> None:
    """The whole model in float32, as it was merged before, takes seven times the largest shard and more."""
    width, layers = 512, 40
    text = tiny_models.qwen2vl_config().to_dict()["text_config"] | {"num_hidden_layers": layers}
    text |= {"hidden_size": width, "intermediate_size": 2 * width, "layer_types": ["full_attention"] * layers}
    text |= {"rope_parameters": {**text["rope_parameters"], "mrope_section": [width // 16, width // 32, width // 32]}}
    text |= {"vocab_size": len(tiny_models.tokenizer())}
    graft = tiny_models.save_tiny_graft(tmp_path / "graft", width=width, text_config=text)
    model, _ = open_graft(graft)
    large = save_stage(tmp_path, model)
    merge = functools.partial(write_merged, large, dtype=torch.bfloat16, onto_nf4=False)
    for name in ("small", "merged"):
        (tmp_path / name).mkdir()
    # The module tree and the imports take memory that does not grow with the shards.
    growth = peak_growth(
        functools.partial(merge, tmp_path / "small", shard_bytes=2_000_000),
        functools.partial(merge, tmp_path / "merged", shard_bytes=50_000_000),
    )
    sizes = [path.stat().st_size for path in (tmp_path / "merged").glob("model-*.safetensors")]
    assert len(sizes) >= 3
    assert 0.9 * max(sizes) <= growth <= 1.3 * max(sizes)
