"""Test the estimates of transcription: real models' memory and FLOPs, and the speeds that were measured."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperForConditionalGeneration

from graft.checkpoints.known_bases import known_config
from graft.inference.engines.graft_decoder import GraftDecoder
from graft.inference.engines.kv_cache import Slots
from graft.inference.engines.whisper_decoder import WhisperDecoder
from graft.inference.estimate import (
    GPU_SHARE,
    audio_rate,
    cpu,
    graft_memory,
    graft_work,
    whisper_memory,
    whisper_work,
)
from graft.inference.transcriber import BATCH_TOKENS
from graft.model.configuration import GraftConfig
from graft.training.devices import DEVICES, find_device
from tests.support import tiny_models

SMALL = known_config("bundled", "bundled", audio_margin_s=2.0, audio_projector="mlp")


def seven() -> GraftConfig:
    return known_config("openai/whisper-large-v3-turbo", "Qwen/Qwen2-VL-7B-Instruct", audio_margin_s=0.0)


def cache_bytes(slots: Slots) -> int:
    return sum(one.numel() * one.element_size() for one in [*slots._memory, *slots.windows, slots._spare])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_cache_of_a_whisper_are_those_of_a_real_model(dtype):
    model = WhisperForConditionalGeneration(tiny_models.whisper_config()).to(dtype)
    memory = whisper_memory(model.config, dtype_bytes=dtype.itemsize, kind="cpu")
    assert memory.weights == sum(one.numel() * one.element_size() for one in model.parameters())
    decoder = WhisperDecoder(model, pad_id=0)
    decoder.reserve(BATCH_TOKENS["cpu"])
    assert memory.cache == cache_bytes(decoder.slots)
    assert whisper_work(model.config, chunk_s=10.0, dtype_bytes=4, kind="cpu").rows == len(decoder.slots.windows[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_cache_are_those_of_a_real_model(dtype):
    model = tiny_models.graft_model().to(dtype)
    memory = graft_memory(model.config, chunk_s=28.0, dtype_bytes=dtype.itemsize, kind="cpu")
    assert memory.weights == sum(one.numel() * one.element_size() for one in model.parameters())
    decoder = GraftDecoder(model, pad_id=0)
    decoder.reserve(BATCH_TOKENS["cpu"])
    assert memory.cache == cache_bytes(decoder.slots)
    assert memory.activations > 0


def test_7b_in_bf16_takes_its_known_memory():
    memory = graft_memory(seven(), chunk_s=30.0, dtype_bytes=2)
    assert memory.weights == pytest.approx(17.87e9, rel=1e-3)
    assert memory.cache == pytest.approx(65_536 * 57_344, rel=0.02)
    assert memory.total < 30e9


def test_torch_counts_the_same_flops_of_a_prompt():
    config = tiny_models.graft_config(audio_context="valid")
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.vocab_size = 128, 256, 240
    text.rope_parameters = text.rope_parameters | {"mrope_section": [8, 4, 4]}
    config.vision_config.hidden_size = 128
    for one in (config, text, config.audio_config):
        one._attn_implementation = "eager"
    model = tiny_models.GraftForConditionalGeneration(config).eval()
    features, counts = tiny_models.log_mels([400])
    ids = torch.tensor([tiny_models.prompt(model, 400, [7] * 11)])  # 16 tokens besides the audio
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, input_features=features, audio_frame_counts=counts, logits_to_keep=1)
    work = graft_work(config, chunk_s=4.0, dtype_bytes=4)
    head = 2 * 240 * 128
    unseen = 2 * 2 * 128 * ids.shape[1] ** 2  # eager attention computes the half that the causal mask discards, too
    assert counter.get_total_flops() == pytest.approx(work.prompt_flops + head + unseen, rel=0.01)


def test_torch_counts_the_same_flops_of_whispers_encoder_and_decoder():
    config = tiny_models.whisper_config()
    config._attn_implementation = "eager"
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_features=torch.zeros(1, 80, 3000), decoder_input_ids=torch.tensor([[3, 4, 5, 6]]))
    work = whisper_work(config, chunk_s=4.0, dtype_bytes=4)
    assert counter.get_total_flops() == pytest.approx(work.prompt_flops, rel=0.01)


@pytest.mark.parametrize(("clip_s", "rows", "rtfx"), [(10.0, 152, 821), (30.0, 62, 702)])
def test_an_h200_reaches_the_share_that_was_measured(clip_s, rows, rtfx):
    device = find_device("h200")
    work = replace(graft_work(seven(), chunk_s=clip_s, dtype_bytes=2), rows=rows)
    assert audio_rate(work, device, GPU_SHARE) == pytest.approx(rtfx, rel=0.06)
    assert audio_rate(work, device, 1.0) == pytest.approx(rtfx / GPU_SHARE, rel=0.06)


@pytest.mark.parametrize(("clip_s", "rtfx"), [(3.7, 4.5), (7.4, 5.3)])
def test_a_cpu_thread_reaches_the_speed_that_was_measured(clip_s, rtfx):
    work = graft_work(SMALL, chunk_s=clip_s, dtype_bytes=4, kind="cpu")
    assert audio_rate(work, cpu(1), 1.0) == pytest.approx(rtfx, rel=0.1)
    assert audio_rate(work, cpu(4), 1.0) == pytest.approx(4 * rtfx, rel=0.1)


def test_chunks_that_decode_together_share_the_weights():
    device = find_device("h200")
    work = graft_work(seven(), chunk_s=10.0, dtype_bytes=2)
    alone, together = (audio_rate(replace(work, rows=rows), device, 1.0) for rows in (1, 100))
    assert together > 10 * alone
    assert work.rows == BATCH_TOKENS["cuda"] // 384


def test_every_device_has_all_figures():
    for device in filter(None, DEVICES.values()):
        assert 1e13 < device.flops < 1e16
        assert 1e11 < device.bytes_per_s < 1e13
        assert 1e10 < device.memory_bytes < 1e12
