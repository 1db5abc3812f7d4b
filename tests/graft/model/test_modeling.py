"""Test the model on tiny random weights: batching, caching, saving, equality with stock Whisper, and the loss."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, WhisperFeatureExtractor

from graft.audio.clip import AudioClip
from graft.audio.features import Featurizer
from graft.model.configuration import GraftConfig, audio_token_count
from graft.model.encoder import encode_audio, pad_with_silence
from graft.model.modeling import GraftForConditionalGeneration
from tests.support import tiny_models

VARIANTS = [
    {"audio_pool": pool, "audio_context": context, "audio_margin_s": margin, "audio_projector": projector}
    for pool, context, margin, projector in [
        (1, "full", 0.0, "linear"),
        (2, "trim", 0.0, "mlp"),
        (4, "trim", 0.0, "linear"),
        (1, "valid", 0.0, "linear"),
        (2, "valid", 1.0, "linear"),
        (4, "valid", 2.0, "mlp"),
        (2, "valid", 1.0, "conv"),
        (4, "trim", 0.0, "conv"),
    ]
]


def variant_name(variant: dict) -> str:
    return "-".join(str(value) for value in variant.values())


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_batch_with_left_padding_equals_single_rows(variant):
    model = tiny_models.graft_model(**variant)
    counts = [37, 250, 8]
    features, frame_counts = tiny_models.log_mels(counts)
    ids, mask = tiny_models.pad_rows([tiny_models.prompt(model, count) for count in counts], left=True)
    with torch.no_grad():
        together = model(
            input_ids=ids, attention_mask=mask, input_features=features, audio_frame_counts=frame_counts
        ).logits[:, -1]
        for index, count in enumerate(counts):
            alone = model(
                input_ids=torch.tensor([tiny_models.prompt(model, count)]),
                input_features=features[index : index + 1, :, : count + 2],
                audio_frame_counts=frame_counts[index : index + 1],
            ).logits[0, -1]
            torch.testing.assert_close(together[index], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_audio_changes_the_logits(variant):
    model = tiny_models.graft_model(**variant)
    ids = torch.tensor([tiny_models.prompt(model, 60)])
    (one, counts), (two, _) = tiny_models.log_mels([60], seed=1), tiny_models.log_mels([60], seed=2)
    with torch.no_grad():
        logits = [
            model(input_ids=ids, input_features=features, audio_frame_counts=counts).logits[0, -1]
            for features in (one, two)
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_cached_decoding_equals_uncached_and_encodes_the_audio_once():
    model = tiny_models.graft_model()
    counts = [90, 30]
    features, frame_counts = tiny_models.log_mels(counts)
    ids, mask = tiny_models.pad_rows([tiny_models.prompt(model, count) for count in counts], left=True)
    calls = []
    model.audio_tower.conv1.register_forward_hook(lambda *_: calls.append(1))
    inputs = {"input_ids": ids, "attention_mask": mask, "input_features": features, "audio_frame_counts": frame_counts}
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "suppress_tokens": [tiny_models.AUDIO_ID],
    }
    cached = model.generate(**inputs, **options, use_cache=True)
    assert len(calls) == 1
    uncached = model.generate(**inputs, **options, use_cache=False)
    assert cached.shape == (2, ids.shape[1] + 12)
    assert torch.equal(cached, uncached)


def image_inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor(
        [[5, tiny_models.VISION_START_ID, *[tiny_models.IMAGE_ID] * 4, tiny_models.VISION_END_ID, 6, 7, 8]]
    )
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))  # 1 x 4 x 4 patches
    types = (ids == tiny_models.IMAGE_ID).int()
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": types,
    }


def test_text_and_image_logits_equal_plain_qwen2vl_bit_for_bit():
    base = tiny_models.qwen2vl_model()
    model = tiny_models.graft_model()
    model.load_state_dict(base.state_dict(), strict=False)
    text = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
    with torch.no_grad():
        for inputs in (text, image_inputs()):
            assert torch.equal(model(**inputs).logits, base(**inputs).logits)


def test_image_and_audio_in_one_prompt():
    model = tiny_models.graft_model()
    features, counts = tiny_models.log_mels([40])
    inputs = image_inputs()
    audio = torch.tensor([tiny_models.prompt(model, 40)])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], audio], dim=1)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny_models.IMAGE_ID).int()

    def last_logits(pixels, mels):
        with torch.no_grad():
            return model(**{**inputs, "pixel_values": pixels}, input_features=mels, audio_frame_counts=counts).logits[
                0, -1
            ]

    logits = last_logits(inputs["pixel_values"], features)
    assert (logits - last_logits(inputs["pixel_values"], features.flip(-1))).abs().max() > 1e-4
    assert (logits - last_logits(-inputs["pixel_values"], features)).abs().max() > 1e-6


@pytest.mark.processes
def test_saved_and_loaded_in_a_fresh_process_is_exact(tmp_path):
    model = tiny_models.graft_model(audio_pool=4, audio_projector="mlp", base_digests={"audio": "a", "text": "b"})
    features, counts = tiny_models.log_mels([64])
    ids = torch.tensor([tiny_models.prompt(model, 64)])
    with torch.no_grad():
        logits = model(input_ids=ids, input_features=features, audio_frame_counts=counts).logits
    model.save_pretrained(tmp_path / "graft")
    torch.save({"ids": ids, "features": features, "counts": counts, "logits": logits}, tmp_path / "case.pt")
    script = f"""
import torch, graft.model.modeling
from transformers import AutoModelForImageTextToText
case = torch.load({str(tmp_path / "case.pt")!r})
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "graft")!r}).eval()
assert type(model).__name__ == "GraftForConditionalGeneration"
assert model.config.base_digests == dict(audio="a", text="b")
with torch.no_grad():
    logits = model(input_ids=case["ids"], input_features=case["features"], audio_frame_counts=case["counts"]).logits
assert torch.equal(logits, case["logits"]), (logits - case["logits"]).abs().max()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_auto_classes_know_the_graft(tmp_path):
    tiny_models.graft_model().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GraftConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), GraftForConditionalGeneration)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), GraftForConditionalGeneration)


def test_wrong_token_counts_raise_with_both_numbers():
    model = tiny_models.graft_model()
    features, counts = tiny_models.log_mels([40])
    ids = torch.tensor([[*tiny_models.prompt(model, 40), tiny_models.AUDIO_ID]])
    with pytest.raises(ValueError, match=r"11 audio placeholders .* 10 audio tokens"):
        model(input_ids=ids, input_features=features, audio_frame_counts=counts)
    with pytest.raises(ValueError, match="11 audio placeholders"):
        model(input_ids=ids)


def test_a_plain_qwen2vl_checkpoint_is_refused(tmp_path):
    tiny_models.qwen2vl_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="qwen2_vl checkpoint, not a graft"):
        GraftForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks"):
        GraftForConditionalGeneration.from_pretrained(tmp_path, config=tiny_models.graft_config())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("audio_pool", 3),
        ("audio_context", "some"),
        ("audio_projector", "perceiver"),
        ("audio_margin_s", -1.0),
        ("text_style", "upper"),
    ],
)
def test_wrong_configuration_values_raise(key, value):
    with pytest.raises(ValueError, match=key):
        tiny_models.graft_config(**{key: value})


def test_audio_token_counts():
    assert audio_token_count(3000, pool=1, context="valid") == 1500
    assert audio_token_count(100, pool=1, context="full") == 1500
    assert [audio_token_count(n, pool=2, context="trim") for n in (4, 5, 6, 7, 8)] == [1, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="3001 mel frames"):
        audio_token_count(3001, pool=1, context="valid")


def stock_states(whisper, features: torch.Tensor, counts: torch.Tensor, pool: int) -> torch.Tensor:
    """Run the stock encoder on the padded window, pooled before its final LayerNorm by torch's own pooling."""
    window = pad_with_silence(features, counts, 3000)
    norm, whisper.encoder.layer_norm = whisper.encoder.layer_norm, torch.nn.Identity()
    hidden = whisper.encoder(window).last_hidden_state
    whisper.encoder.layer_norm = norm
    return norm(torch.nn.functional.avg_pool1d(hidden.transpose(1, 2), pool, pool).transpose(1, 2))


@pytest.mark.parametrize("pool", [1, 2, 4])
@torch.no_grad()
def test_full_and_trim_equal_stock_whisper(pool):
    whisper = tiny_models.whisper_model()
    features, counts = tiny_models.log_mels([333, 120, 3000 - 2])
    stock = stock_states(whisper, features, counts, pool)
    full = encode_audio(
        whisper.encoder, features, counts, tiny_models.graft_config(audio_pool=pool, audio_context="full")
    )
    torch.testing.assert_close(full, stock.flatten(0, 1), rtol=0, atol=1e-5)
    trim = encode_audio(
        whisper.encoder, features, counts, tiny_models.graft_config(audio_pool=pool, audio_context="trim")
    )
    own = [stock[i, : audio_token_count(int(n), pool=pool, context="trim")] for i, n in enumerate(counts)]
    torch.testing.assert_close(trim, torch.cat(own), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seconds", [0.3, 2.005, 12.34, 29.995, 30.0])
@torch.no_grad()
def test_full_from_the_waveform_equals_stock_whisper_from_the_waveform(seconds):
    """The expected states come from transformers alone: its features, padded to 30 s, through its encoder."""
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)
    whisper = tiny_models.whisper_model()
    stock_features = WhisperFeatureExtractor(feature_size=80)(
        samples, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    stock = whisper.encoder(stock_features).last_hidden_state[0]
    features = Featurizer(80)(AudioClip(samples))
    mel, count = torch.from_numpy(features.mel)[None], torch.tensor([features.frame_count])
    for context in ("full", "trim"):
        ours = encode_audio(whisper.encoder, mel, count, tiny_models.graft_config(audio_pool=1, audio_context=context))
        torch.testing.assert_close(ours, stock[: len(ours)], rtol=0, atol=1e-4)
    assert len(ours) == -(-features.frame_count // 2)


@pytest.mark.parametrize("margin_s", [0.0, 0.5])
@torch.no_grad()
def test_valid_equals_stock_whisper_that_sees_the_same_context_only(margin_s):
    whisper = tiny_models.whisper_model()
    features, counts = tiny_models.log_mels([333])
    valid = encode_audio(
        whisper.encoder,
        features,
        counts,
        tiny_models.graft_config(audio_pool=1, audio_context="valid", audio_margin_s=margin_s),
    )
    context = 167 + round(margin_s * 50)
    encoder = whisper.encoder
    window = pad_with_silence(features, counts, 3000)
    # Stock convolutions over the whole window, then the stock layers on the first `context` states only.
    hidden = torch.nn.functional.gelu(encoder.conv2(torch.nn.functional.gelu(encoder.conv1(window)))).transpose(1, 2)
    hidden = (hidden + encoder.embed_positions.weight)[:, :context]
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    torch.testing.assert_close(valid, encoder.layer_norm(hidden)[0, :167], rtol=0, atol=1e-5)


@torch.no_grad()
def test_valid_with_the_widest_margin_equals_trim():
    whisper = tiny_models.whisper_model()
    features, counts = tiny_models.log_mels([500, 2990])
    valid, trim = (
        encode_audio(
            whisper.encoder, features, counts, tiny_models.graft_config(audio_context=context, audio_margin_s=30.0)
        )
        for context in ("valid", "trim")
    )
    torch.testing.assert_close(valid, trim, rtol=0, atol=1e-5)


def test_loss_of_gathered_logits_equals_loss_of_all_logits():
    model = tiny_models.graft_model()
    counts = [40, 90]
    features, frame_counts = tiny_models.log_mels(counts)
    rows = [[*tiny_models.prompt(model, count), 20 + i, 30 + i, 2] for i, count in enumerate(counts)]
    ids, mask = tiny_models.pad_rows(rows, left=False)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        labels[i, len(row) - 3 : len(row)] = ids[i, len(row) - 3 : len(row)]
    inputs = {"input_ids": ids, "attention_mask": mask, "input_features": features, "audio_frame_counts": frame_counts}
    with torch.no_grad():
        logits = model(**inputs).logits
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        torch.testing.assert_close(model(**inputs, labels=labels).loss, expected / 6)
        torch.testing.assert_close(model(**inputs, labels=labels, label_count=60).loss, expected / 60)


def test_a_batch_without_labels_has_a_loss_of_zero_and_a_gradient():
    model = tiny_models.graft_model()
    features, counts = tiny_models.log_mels([40])
    ids = torch.tensor([tiny_models.prompt(model, 40)])
    loss = model(
        input_ids=ids, input_features=features, audio_frame_counts=counts, labels=torch.full_like(ids, -100)
    ).loss
    loss.backward()
    assert loss.item() == 0
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in model.audio_projector.parameters()
    )
