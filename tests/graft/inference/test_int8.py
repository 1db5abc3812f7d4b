"""int8 on a CPU: near float32, rows of a layer apart, a fourth of the memory, one line where refused."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from graft.audio.chunking import windows
from graft.audio.clip import read_audio
from graft.checkpoints.loading import multiplies_int8
from graft.errors import ModelError
from graft.inference.int8 import Int8Linear, int8_layers, quantize_to_int8, quantized_bytes
from graft.inference.transcriber import Transcriber, open_transcriber
from graft.text.wer import score
from tests.support import tiny_models
from tests.support.paths import ROOT

PROMPTS = ROOT / "jobs" / "data" / "prompts"
KINDS = {"graft": tiny_models.graft_model, "whisper": tiny_models.whisper_for_generation}
needs_int8 = pytest.mark.skipif(not multiplies_int8(), reason="this processor has neither VNNI nor AMX")


def linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.weight.data *= torch.logspace(-3, 1, outputs)[:, None]  # channels of very different sizes
    return layer


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (3, 50, 64), (2, 1, 64)])
def test_a_layer_is_near_the_one_it_replaces_in_every_channel(shape: tuple[int, ...], bias: bool) -> None:
    layer, states = linear(64, 33, bias=bias), 0.5 + torch.randn(shape)
    states[..., 3] *= 8  # models have channels that stand out
    expected, found = layer(states), Int8Linear(layer)(states)
    assert found.shape == expected.shape
    error = (found - expected).flatten(0, -2).norm(dim=0) / expected.flatten(0, -2).norm(dim=0)
    assert error.max() < 0.06


@needs_int8
def test_rows_do_not_change_one_another() -> None:
    layer, rows = Int8Linear(linear(64, 33, bias=True)), torch.randn(40, 64) * torch.logspace(-2, 2, 40)[:, None]
    together = layer(rows)
    for row, expected in zip(rows, together, strict=True):
        torch.testing.assert_close(layer(row[None])[0], expected, rtol=1e-6, atol=1e-6)
    assert not layer(torch.zeros(2, 64)).sub(layer(torch.zeros(1, 64))).any()


@needs_int8
@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_but_those_of_the_projector_and_of_images_take_one_byte_for_a_weight(kind: str) -> None:
    model = KINDS[kind]()
    replaced = {name for name, _ in int8_layers(model)}
    left = {name for name, one in model.named_modules() if isinstance(one, nn.Linear)} - replaced
    assert replaced
    assert all(name.startswith(("audio_projector", "model.visual")) for name in left)
    expected, before = quantized_bytes(model), 4 * sum(one.numel() for one in model.parameters())
    quantize_to_int8(model)
    layers = [one for one in model.modules() if isinstance(one, Int8Linear)]
    assert len(layers) == len(replaced)
    kept = sum(one.numel() * one.element_size() for one in model.parameters())
    tensors = [one for layer in layers for one in vars(layer).values() if isinstance(one, torch.Tensor)]
    assert expected == kept + sum(one.numel() * one.element_size() for one in tensors) < before
    assert all(layer._weight.dtype == torch.int8 for layer in layers)


@needs_int8
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_int8_is_neither_trained_nor_saved(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind]()
    quantize_to_int8(model)
    model.eval()
    with pytest.raises(ModelError, match="a model in int8 only transcribes: open it without dtype=int8 to train it"):
        model.train()
    with pytest.raises(ModelError, match="open it without dtype=int8 to save it"):
        model.save_pretrained(tmp_path)


def test_a_gpu_and_vllm_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny_graft(tmp_path / "tiny")
    with pytest.raises(ModelError, match="dtype=int8 computes on CPUs only: leave it out on a GPU"):
        open_transcriber(folder, dtype="int8", device="cuda")
    with pytest.raises(ModelError, match="dtype=int8 does not go with engine=vllm"):
        open_transcriber(folder, dtype="int8", device="cpu", engine="vllm")


def test_a_processor_without_the_instructions_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": True})
    with pytest.raises(ModelError, match="needs a processor with VNNI or AMX, and this one has neither: leave it out"):
        quantize_to_int8(tiny_models.graft_model())


@needs_int8
@pytest.mark.bundled
@pytest.mark.seconds
@pytest.mark.parametrize("model", ["small", "whisper"])
def test_clips_have_their_texts_alone_and_together(model: str, bundled_weights: None) -> None:
    rows = [json.loads(line) for line in (PROMPTS / "unseen.jsonl").read_text().splitlines()]
    rows = sorted(rows, key=lambda row: row["duration_s"])[:3]
    clips = [read_audio(PROMPTS / row["audio"]) for row in rows]
    transcriber = open_transcriber(model, device="cpu", dtype="int8", chunker=windows)
    together = [transcript.text for transcript in transcriber.transcribe_many(clips)]
    alone = [transcriber.transcribe(clip).text for clip in clips]
    assert all(score([row["text"] for row in rows], texts).wer < 0.15 for texts in (together, alone))
    _cancel_one(transcriber, clips[0])
    assert transcriber.counts().running == 0
    transcriber.close()


def _cancel_one(transcriber: Transcriber, clip: object) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(transcriber.transcribe_async(clip))  # type: ignore[arg-type]
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancel())


@needs_int8
@pytest.mark.parametrize("kind", KINDS)
def test_opened_in_int8_the_next_tokens_are_as_likely_as_in_fp32(kind: str, tmp_path: Path) -> None:
    """The log-probabilities of a tiny model's next tokens, which are far more alike than those of a trained one."""
    model = KINDS[kind]()
    mel, counts = tiny_models.log_mels([250] if kind == "graft" else [2998])
    if kind == "graft":
        inputs = {"input_ids": torch.tensor([tiny_models.prompt(model, 250, [7, 8, 9])])}
        inputs |= {"input_features": mel, "audio_frame_counts": counts}
    else:
        inputs = {"input_features": mel, "decoder_input_ids": torch.tensor([[3, 7, 8]])}
    with torch.no_grad():
        expected = model(**inputs).logits.log_softmax(dim=-1)
        quantize_to_int8(model)
        found = model(**inputs).logits.log_softmax(dim=-1)
    assert (found - expected).abs().max() < 0.1
    assert found.ne(expected).any()
