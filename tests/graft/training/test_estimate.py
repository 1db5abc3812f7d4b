"""Test the estimates: known figures of known shapes, and torch's own FLOP count of a tiny graft's training step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graft.checkpoints.known_bases import known_config
from graft.checkpoints.lora import LoraSettings, add_adapters
from graft.model.configuration import GraftConfig, audio_token_count
from graft.model.modeling import GraftForConditionalGeneration
from graft.model.projector import KERNEL_SIZE, AudioProjector
from graft.training.devices import device_peak_flops
from graft.training.estimate import (
    batch_flops,
    count_parameters,
    encoder_flops,
    lora_parameters,
    matrix_parameters,
    projector_flops,
    text_flops,
)
from tests.support import tiny_models

TURBO, SEVEN = "openai/whisper-large-v3-turbo", "Qwen/Qwen2-VL-7B-Instruct"


def seven(**audio: object) -> GraftConfig:
    return known_config(TURBO, SEVEN, **audio)


def test_the_parameters_of_the_7b_pair():
    config = seven(audio_pool=1, audio_context="full")
    parameters = count_parameters(config, lora_rank=64)
    assert parameters.audio_tower == 636_968_960
    assert parameters.projector == 4_587_520
    assert parameters.lora == lora_parameters(config, 64) == 161_480_704
    assert parameters.total == 8_932_932_096
    assert parameters.text + parameters.lm_head == pytest.approx(7.62e9, rel=1e-3)
    assert matrix_parameters(config) == pytest.approx(6.525e9, rel=1e-3)
    assert parameters.trained == 4_587_520 + 161_480_704


def test_a_tied_head_has_no_parameters_of_its_own():
    sizes = {name: count_parameters(known_config(TURBO, f"Qwen/Qwen3-{name}")) for name in ("0.6B", "8B")}
    assert {name: size.text + size.lm_head for name, size in sizes.items()} == {
        "0.6B": 596_049_920,
        "8B": 8_190_735_360,
    }
    parameters = count_parameters(known_config(TURBO, "Qwen/Qwen2-VL-2B-Instruct"))
    assert parameters.lm_head == 0
    assert parameters.text + parameters.vision == 2_208_985_600
    assert parameters.lora == 0


@pytest.mark.parametrize(("lora_rank", "encoder"), [(None, False), (4, False), (4, True)])
def test_parameters_are_those_of_a_real_model(lora_rank, encoder):
    model = tiny_models.graft_model()
    parameters = count_parameters(model.config, lora_rank=lora_rank, lora_encoder=encoder)
    if lora_rank:
        add_adapters(model, LoraSettings(rank=lora_rank, encoder=encoder))
    assert parameters.total + parameters.lora == sum(parameter.numel() for parameter in model.parameters())


def test_the_encoder_costs_what_it_encodes():
    assert encoder_flops(seven(audio_context="trim"), [1000]) == pytest.approx(2.27e12, rel=5e-3)
    assert encoder_flops(seven(audio_context="valid", audio_margin_s=0.0), [1000, 1000]) == pytest.approx(
        2 * 0.676e12, rel=5e-3
    )
    longer = encoder_flops(seven(audio_context="valid", audio_margin_s=1.0), [1000])
    assert longer / encoder_flops(seven(audio_context="valid", audio_margin_s=0.0), [1000]) == pytest.approx(
        1.1, abs=0.02
    )
    assert encoder_flops(seven(audio_context="valid"), [3000]) == encoder_flops(seven(audio_context="full"), [100])


@pytest.mark.parametrize(("tokens", "tera"), [(1530, 20.4), (780, 10.3), (405, 5.3), (280, 3.67)])
def test_a_forward_pass_of_7b(tokens, tera):
    config = seven()
    twice, once = (text_flops(config, [tokens], lora_rank=None, repeats_forward=repeats) for repeats in (True, False))
    assert (twice - once) / 1e12 == pytest.approx(tera, rel=5e-3)


@pytest.mark.parametrize(
    ("audio", "checkpointing", "a100", "h200"),
    [
        ({"audio_pool": 1, "audio_context": "full"}, True, 2.3, 5.7),
        ({"audio_pool": 1, "audio_context": "full"}, False, 3.5, 8.8),
        ({"audio_pool": 1, "audio_context": "trim"}, False, 9.0, 22.8),
        ({"audio_pool": 2, "audio_context": "trim"}, False, 14.7, 37.0),
    ],
)
def test_the_known_rates_of_stage_1(audio, checkpointing, a100, h200):
    """Compare samples/s at 50 % of peak, for clips of 10 s with 70 text tokens; the first with logits everywhere."""
    config = seven(**audio)
    tokens = audio_token_count(1000, pool=config.audio_pool, context=config.audio_context) + 70
    settings = {"token_counts": [tokens], "frame_counts": [1000], "gradient_checkpointing": checkpointing}
    flops = batch_flops(config, label_count=tokens if checkpointing else 35, lora_rank=None, **settings)
    for device, rate in (("a100", a100), ("h200", h200)):
        assert 0.5 * device_peak_flops(device) / flops == pytest.approx(rate, rel=0.03)
    adapted = batch_flops(config, label_count=tokens if checkpointing else 35, lora_rank=64, **settings)
    assert adapted / flops == pytest.approx(1.03, abs=0.01)


def counted_config(**audio: object) -> GraftConfig:
    """Make a graft wide enough that uncounted FLOPs (rotary positions, norms) do not matter.

    Eager attention lets torch count it.
    """
    base = tiny_models.graft_config(**audio).to_dict()
    text = base["text_config"] | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 240}
    text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [8, 4, 4]}
    config = GraftConfig(**{**base, "text_config": text, "vision_config": base["vision_config"] | {"hidden_size": 128}})
    config._attn_implementation = config.text_config._attn_implementation = config.audio_config._attn_implementation = (
        "eager"
    )
    return config


@pytest.mark.parametrize(
    ("audio", "lora_rank", "encoder", "checkpointing"),
    [
        ({"audio_context": "valid"}, None, False, False),
        ({"audio_context": "trim", "audio_pool": 4}, None, False, True),
        ({"audio_context": "full", "audio_projector": "mlp"}, 8, False, False),
        ({"audio_context": "valid", "audio_projector": "conv", "audio_projector_blocks": 2}, 8, False, False),
        ({"audio_context": "valid", "audio_pool": 1}, 8, False, True),
        ({"audio_context": "trim", "audio_pool": 1}, 8, True, False),
    ],
)
def test_torch_counts_the_same_flops(audio, lora_rank, encoder, checkpointing):
    torch.manual_seed(0)
    config = counted_config(**audio)
    model = GraftForConditionalGeneration(config).requires_grad_(False)
    if lora_rank:
        add_adapters(model, LoraSettings(rank=lora_rank, dropout=0.0, encoder=encoder))
    model.audio_projector.requires_grad_(True)
    if checkpointing:
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    features, counts = tiny_models.log_mels([400])
    prompt = tiny_models.prompt(model, 400)
    ids = torch.tensor([[*prompt, *range(20, 30)]])
    labels = torch.tensor([[-100] * len(prompt) + list(range(20, 30))])
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=labels, input_features=features, audio_frame_counts=counts).loss.backward()
    tokens = ids.shape[1]
    settings = {"lora_rank": lora_rank, "lora_encoder": encoder, "gradient_checkpointing": checkpointing}
    expected = batch_flops(config, token_counts=[tokens], label_count=10, frame_counts=[400], **settings)
    # Eager attention also computes the half of the scores that the causal mask discards.
    unseen = 2 * 2 * 128 * tokens**2 * (4 if checkpointing else 3)
    # torch stops a repeated layer once it has all it needs, with frozen weights before the last matrix.
    left_out = 2 * tokens * 2 * 256 * 128 if checkpointing and not lora_rank else 0
    overcounted = depthwise_overcount(config, 200) if config.audio_projector == "conv" else 0
    assert counter.get_total_flops() == pytest.approx(expected + unseen - left_out + overcounted, rel=0.01)


def depthwise_overcount(config: GraftConfig, states: int) -> int:
    """FLOPs that torch counts too many: it takes a depthwise convolution's weight gradient for a full one's."""
    width = config.audio_config.d_model
    return 2 * KERNEL_SIZE * width * (width - 1) * config.audio_projector_blocks * states


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
@pytest.mark.parametrize("to_encoder", [False, True])
def test_torch_counts_the_same_flops_of_a_projector(kind, to_encoder):
    config = tiny_models.graft_config(audio_projector=kind)
    width, text_width = config.audio_config.d_model, config.text_config.hidden_size
    projector = AudioProjector.from_config(config, text_width=text_width)
    # Two clips of 2 s, 25 tokens a second.
    states = torch.rand(100 * projector.pool, width, requires_grad=to_encoder)
    with FlopCounterMode(display=False) as counter:
        projector(states, [50, 50]).sum().backward()
    overcounted = depthwise_overcount(config, 200) if kind == "conv" else 0
    assert counter.get_total_flops() == projector_flops(config, [200, 200], to_encoder=to_encoder) + overcounted


def test_devices_are_known_by_their_names():
    assert device_peak_flops("NVIDIA H200") == device_peak_flops("h200") == 790e12
    assert device_peak_flops("NVIDIA A100-SXM4-40GB") == device_peak_flops("a100-40") == 312e12
    assert device_peak_flops("NVIDIA GH200 480GB") == 989e12
    assert device_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert device_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert device_peak_flops("NVIDIA L40S") == 362e12
    assert device_peak_flops("NVIDIA L4") == 121e12
    assert device_peak_flops("NVIDIA RTX 6000 Ada Generation") == 364e12
    assert device_peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert device_peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert device_peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    assert device_peak_flops("Tesla T4") is None
    assert device_peak_flops("") is None
