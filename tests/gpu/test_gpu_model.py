"""Test the model on the device: rows and batches, caching, audio and text, float32 and bfloat16."""

from typing import Any

import pytest
import torch
from transformers import WhisperModel

from graft.model.configuration import audio_token_count
from graft.model.encoder import encode_audio, pad_with_silence
from graft.model.modeling import GraftForConditionalGeneration
from tests.support import tiny_models, wide_models

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Tolerances relative to the size of the values: float32 sums in another order, and bfloat16 through four layers."""
VARIANTS = [
    {"audio_pool": 1, "audio_context": "full"},
    {"audio_pool": 2, "audio_context": "trim", "audio_projector": "mlp"},
    {"audio_pool": 4, "audio_context": "valid", "audio_margin_s": 1.0},
]
CONTEXTS = [variant["audio_context"] for variant in VARIANTS]
FRAMES = [37, 250, 8]


def inputs_for(model: GraftForConditionalGeneration, *, left: bool) -> dict[str, torch.Tensor]:
    features, counts = tiny_models.log_mels(FRAMES)
    ids, mask = tiny_models.pad_rows([tiny_models.prompt(model, count) for count in FRAMES], left=left)
    inputs = {"input_ids": ids, "attention_mask": mask, "input_features": features, "audio_frame_counts": counts}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def labelled(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Label the last two ids of each right-padded row; returns the labels and their number."""
    ends = inputs["attention_mask"].sum(dim=1, keepdim=True)
    places = torch.arange(inputs["input_ids"].shape[1], device=ends.device)
    is_label = (places >= ends - 2) & (places < ends)
    return torch.where(is_label, inputs["input_ids"], -100), 2 * len(FRAMES)


@pytest.mark.parametrize("variant", VARIANTS, ids=CONTEXTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@torch.no_grad()
def test_a_batch_equals_its_rows(device: torch.device, dtype: torch.dtype, variant: dict[str, Any]) -> None:
    model = wide_models.wide_model(device, dtype=dtype, **variant)
    inputs = inputs_for(model, left=True)
    together = model(**inputs).logits[:, -1]
    for row, count in enumerate(FRAMES):
        alone = model(
            input_ids=torch.tensor([tiny_models.prompt(model, count)], device=device),
            input_features=inputs["input_features"][row : row + 1, :, : count + 2],
            audio_frame_counts=inputs["audio_frame_counts"][row : row + 1],
        ).logits[0, -1]
        assert wide_models.distance(together[row], alone) < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", VARIANTS, ids=CONTEXTS)
@torch.no_grad()
def test_bfloat16_is_close_to_float32(device: torch.device, variant: dict[str, Any]) -> None:
    """The difference is also smaller than that of other audio."""
    exact, rounded = (wide_models.wide_model(device, dtype=dtype, **variant) for dtype in DTYPES)
    inputs = inputs_for(exact, left=True)
    expected = exact(**inputs).logits[:, -1]
    assert 0 < wide_models.distance(rounded(**inputs).logits[:, -1], expected) < TOLERANCE[torch.bfloat16]
    other = exact(**{**inputs, "input_features": -inputs["input_features"]}).logits[:, -1]
    assert wide_models.distance(other, expected) > 2 * TOLERANCE[torch.bfloat16]


@torch.no_grad()
def test_the_device_computes_what_a_cpu_does(cuda: torch.device) -> None:
    model = wide_models.wide_model(torch.device("cpu"))
    expected = model(**inputs_for(model, left=True)).logits[:, -1]
    model.to(cuda)
    assert (
        wide_models.distance(model(**inputs_for(model, left=True)).logits[:, -1], expected) < TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@torch.no_grad()
def test_text_logits_equal_those_of_the_text_base(device: torch.device, dtype: torch.dtype) -> None:
    base = tiny_models.qwen2vl_model().to(device, dtype)
    model = tiny_models.graft_model().to(device, dtype)
    model.load_state_dict(base.state_dict(), strict=False)
    ids = torch.tensor([[5, 6, 7, 8, 9]], device=device)
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_cached_decoding_equals_uncached(device: torch.device) -> None:
    model = wide_models.wide_model(device)
    inputs = inputs_for(model, left=True)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "suppress_tokens": [tiny_models.AUDIO_ID],
    }
    cached, uncached = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    assert cached.shape == (len(FRAMES), inputs["input_ids"].shape[1] + 12)


@torch.no_grad()
def test_the_loss_is_that_of_the_labels_and_costs_their_logits_alone(device: torch.device) -> None:
    model = wide_models.wide_model(device)
    inputs = inputs_for(model, left=False)
    labels, label_count = labelled(inputs)
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    shapes = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    loss = model(**inputs, labels=labels, label_count=10).loss
    assert float(loss) == pytest.approx(float(expected) / 10, rel=1e-5)
    assert shapes == [(label_count, tiny_models.VOCABULARY)]


@pytest.mark.parametrize("pool", [1, 2, 4])
@torch.no_grad()
def test_full_and_trim_equal_stock_whisper(device: torch.device, pool: int) -> None:
    parts = wide_models.wide_parts()
    whisper = (
        wide_models.lively(WhisperModel(type(tiny_models.whisper_config())(**parts["audio_config"]))).eval().to(device)
    )
    features, counts = (tensor.to(device) for tensor in tiny_models.log_mels([333, 120, 3000 - 2]))
    norm, whisper.encoder.layer_norm = whisper.encoder.layer_norm, torch.nn.Identity()
    hidden = whisper.encoder(pad_with_silence(features, counts, 3000)).last_hidden_state
    whisper.encoder.layer_norm = norm
    stock = norm(torch.nn.functional.avg_pool1d(hidden.transpose(1, 2), pool, pool).transpose(1, 2))
    own = [
        stock[clip, : audio_token_count(count, pool=pool, context="trim")] for clip, count in enumerate(counts.tolist())
    ]
    for context, expected in (("full", stock.flatten(0, 1)), ("trim", torch.cat(own))):
        ours = encode_audio(
            whisper.encoder, features, counts, tiny_models.graft_config(audio_pool=pool, audio_context=context)
        )
        assert wide_models.distance(ours, expected) < TOLERANCE[torch.float32]
