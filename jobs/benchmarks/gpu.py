"""Measure training steps and the transformers engine on this machine's GPU, without data, weights or Ray.

Weights are random and made on the device, features are noise, all clips have one length; all else is as in training and
transcription. Needs torch and transformers, and peft for stage 2. `--shape tiny` runs anywhere.
"""

import asyncio
import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from graft.audio.features import Features
from graft.checkpoints.known_bases import AUDIO_BASES, TEXT_BASES
from graft.checkpoints.loading import DTYPES
from graft.checkpoints.lora import LoraSettings
from graft.errors import GraftError
from graft.inference.engines.graft_decoder import GraftDecoder
from graft.inference.engines.kv_cache import round_up_columns
from graft.inference.engines.protocol import Engine, EngineRequest
from graft.inference.engines.transformers_engine import TransformersEngine
from graft.model.configuration import TAIL_FRAMES, WINDOW_FRAMES, GraftConfig, audio_token_count
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import IGNORED_LABEL
from graft.training.backends import Backend
from graft.training.devices import device_peak_flops, name_words
from graft.training.estimate import batch_flops
from graft.training.stages import ComputeSettings, Stage, make_backend, prepare_for_stage

from .measuring import Numbers, Row, report_table

SHAPES = {
    "7b": ("openai/whisper-large-v3-turbo", "Qwen/Qwen2-VL-7B-Instruct"),
    "2b": ("openai/whisper-large-v3-turbo", "Qwen/Qwen2-VL-2B-Instruct"),
    "tiny": ("bundled", "bundled"),
}
BUDGETS = {"7b": [2048, 4096, 8192, 16384], "2b": [4096, 8192, 16384, 32768], "tiny": [512, 1024]}
FRAMES_PER_S = 100
PROMPT_TOKENS = 16
# Tokens of an answer for a second of speech in lower case.
LABELS_PER_S = 3.0
# Tokens of prompts that are read between two steps.
PREFILL_TOKENS = 8_192
# Seconds of audio a second that are possible with the 7b shape, 256 clips at a time, by words of a GPU's name and
# seconds of a clip: 2.27 TFLOP to encode 30 s and 0.68 to encode 10 s, 10.3 and 3.67 to read the prompt, and steps that
# read 14.1 GB of weights; 790 TFLOP/s and 4.8 TB/s on an H200, 312 and 1.555 on an A100 of 40 GB.
CEILINGS = {
    ("h200",): {10.0: 1629.0, 30.0: 1660.0},
    ("a100", "40gb"): {10.0: 483.0, 30.0: 497.0},
}

ABOUT_GPU = "{shape}, {device}, torch {torch}, {date}, clips of {clip_s:g} s, {dtype}"
ABOUT_ENGINE = """\
{shape}, {device}, torch {torch}, {date}, {dtype}
ceiling: seconds of audio a second that are possible; rows: answers that share a step; busy: the engine computes"""


def bench_gpu(
    shape: str, stage: Sequence[int], seconds: float, budgets: Sequence[int] | None, clip_s: float, dtype: Any
) -> Numbers:
    """Measure steps of each stage and token budget; MFU is left out where the device's peak is unknown."""
    config, compute, machine = bench_config(shape), ComputeSettings(dtype), _machine(shape)
    peak_flops = device_peak_flops(machine["device"])

    def rows() -> Iterator[Row]:
        for number in stage:
            lora = LoraSettings() if number == 2 else None
            model = prepare_for_stage(_random_model(config, dtype), Stage(number, lora=lora), compute)
            backend = make_backend(model, compute, accumulation=1, weight_decay=0.0, max_grad_norm=1.0)
            for budget in budgets or BUDGETS[shape]:
                inputs, label_count, flops = synthetic_batch(config, budget, clip_s, lora.rank if lora else None)
                try:
                    step_s = _step_s(backend, inputs, label_count, seconds)
                except torch.OutOfMemoryError:
                    print(f"stage{number} {budget}: the device's memory ran out", flush=True)
                    break
                clips, length = inputs["input_ids"].shape
                numbers = {
                    "samples/s": clips / step_s,
                    "clips": clips,
                    "tokens": clips * length,
                    "ms/step": 1000 * step_s,
                    "TFLOP/s": flops / step_s / 1e12,
                    "MFU %": 100 * flops / step_s / peak_flops if peak_flops else None,
                    "GB": torch.cuda.max_memory_allocated() / 1e9 or None,
                }
                yield f"stage{number} {budget}", numbers
            del model, backend, inputs
            gc.collect()
            torch.cuda.empty_cache()

    return machine | report_table(ABOUT_GPU.format(clip_s=clip_s, dtype=dtype, **machine), rows())


def _step_s(backend: Backend, inputs: dict[str, Tensor], label_count: int, seconds: float) -> float:
    """Train on a batch again and again, after a warm-up; returns the mean seconds of a step."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        backend.backward(inputs, label_count=label_count, is_last=True)
        backend.step(1e-4)

    return Timer("step()", globals={"step": step}).blocked_autorange(min_run_time=seconds).mean


def synthetic_batch(
    config: GraftConfig, budget: int, clip_s: float, lora_rank: int | None
) -> tuple[dict[str, Tensor], int, float]:
    """Make as many clips as the budget holds, at least one; returns them, the number of labels and a step's FLOPs."""
    request = _request(config, clip_s)
    labels, frames = request.max_new_tokens, request.features.frame_count
    tokens = len(request.prompt_ids) + labels
    clips = max(1, budget // tokens)
    with _device():
        ids = torch.tensor([request.prompt_ids + list(range(10, 10 + labels))]).repeat(clips, 1)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.where(torch.arange(tokens) >= tokens - labels, ids, IGNORED_LABEL),
            "input_features": torch.tensor(request.features.mel).repeat(clips, 1, 1),
            "audio_frame_counts": torch.full((clips,), frames),
        }
    counts: Any = {"token_counts": [tokens] * clips, "label_count": labels * clips, "frame_counts": [frames] * clips}
    return inputs, labels * clips, batch_flops(config, **counts, lora_rank=lora_rank, gradient_checkpointing=False)


def bench_engine(shape: str, clip_s: Sequence[float], rounds: float, batch_clips: int, dtype: str) -> Numbers:
    """Measure the transformers engine with clips of each length. Raises GraftError where memory does not suffice."""
    config, machine = bench_config(shape), _machine(shape)
    count = max(1, round(rounds * batch_clips))

    def rows() -> Iterator[Row]:
        model = _random_model(config, dtype).eval()
        for each_s in clip_s:
            request = _request(config, each_s)
            tokens = batch_clips * round_up_columns(len(request.prompt_ids) + request.max_new_tokens)
            budgets: Any = {"max_batch_tokens": tokens, "max_prefill_tokens": PREFILL_TOKENS}
            with contextlib.closing(TransformersEngine(GraftDecoder(model, pad_id=0), eos_ids=(), **budgets)) as engine:
                asyncio.run(_transcribe(engine, request, count))  # steps become CUDA graphs when their shapes recur
                before, start = engine.counts(), time.perf_counter()
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                asyncio.run(_transcribe(engine, request, count))
                seconds, after = time.perf_counter() - start, engine.counts()
            rtfx, most = count * each_s / seconds, ceiling(shape, machine["device"], each_s)
            numbers = {
                "clips": count,
                "prompt": len(request.prompt_ids),
                "answer": request.max_new_tokens,
                "RTFx": rtfx,
                "ceiling": most,
                "share %": 100 * rtfx / most if most else None,
                "rows": (after.tokens - before.tokens) / max(1, after.steps - before.steps),
                "busy %": 100 * (after.busy_s - before.busy_s) / seconds,
                "GB": torch.cuda.max_memory_allocated() / 1e9 or None,
            }
            yield f"{each_s:g} s", numbers

    try:
        return machine | report_table(ABOUT_ENGINE.format(dtype=dtype, **machine), rows())
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise GraftError(str(error)) from error


def ceiling(shape: str, name: str, clip_s: float) -> float | None:
    """Return what is possible on a GPU of this name; None where that was not computed."""
    words = name_words(name)
    if shape != "7b" or "mig" in words:
        return None
    return next((most.get(clip_s) for card, most in CEILINGS.items() if words.issuperset(card)), None)


def _request(config: GraftConfig, clip_s: float) -> EngineRequest:
    """Make a request of noise, whose id is set for each clip."""
    frames = round(clip_s * FRAMES_PER_S)
    mel_shape = (config.audio_config.num_mel_bins, min(frames + TAIL_FRAMES, WINDOW_FRAMES))
    mel = np.random.default_rng(0).random(mel_shape, np.float32) - 0.5
    audio = [config.audio_token_id] * audio_token_count(frames, pool=config.audio_pool, context=config.audio_context)
    words = list(range(10, 10 + PROMPT_TOKENS))
    return EngineRequest("", Features(mel, frames), [*words[:5], *audio, *words[5:]], round(clip_s * LABELS_PER_S))


async def _transcribe(engine: Engine, request: EngineRequest, count: int) -> None:
    """Have as many clips transcribed, all at once."""

    async def read(number: int) -> None:
        async for _ in engine.stream(replace(request, request_id=f"clip {number}")):
            pass

    await asyncio.gather(*map(read, range(count)))


def bench_config(shape: str) -> GraftConfig:
    """Return a shape's configuration, with 25 audio tokens a second; the tiny one is the bundled pair of two layers."""
    audio_base, text_base = SHAPES[shape]
    audio, text = dict(AUDIO_BASES[audio_base]), dict(TEXT_BASES[text_base])
    ids = {}
    if shape == "tiny":
        audio["encoder_layers"] = 2
        text["text_config"] = text["text_config"] | {"num_hidden_layers": 2}
        first = text["text_config"]["vocab_size"] - 3
        ids = {"audio_token_id": first, "audio_start_token_id": first + 1, "audio_end_token_id": first + 2}
    return GraftConfig(audio_config=audio, **text, **ids)


def _random_model(config: GraftConfig, dtype: str) -> GraftForConditionalGeneration:
    with _device():
        return GraftForConditionalGeneration._from_config(config, dtype=DTYPES[dtype])


def _device() -> torch.device:
    """Return the first GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _machine(shape: str) -> Numbers:
    """Say what is measured, where and when."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return {"shape": shape, "device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
