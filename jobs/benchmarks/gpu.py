"""`python -m jobs.benchmarks.gpu --shape 7b`: the speed of training steps on this machine's GPU, without data, weights or Ray.

Weights are random and made on the device, features are noise, clips are all of one length; model, backend and arithmetic are those of
training. Needs torch and transformers, and peft for stage 2. `--shape tiny` runs anywhere.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.checkpoints.known_bases import AUDIO_BASES, TEXT_BASES
from graft.checkpoints.loading import DTYPES
from graft.checkpoints.lora import LoraSettings
from graft.errors import GraftError, OutputError
from graft.model.configuration import GraftConfig, audio_token_count
from graft.model.modeling import GraftForConditionalGeneration
from graft.training.backends import Backend
from graft.training.estimate import batch_flops, device_peak_flops
from graft.training.stages import ComputeSettings, Stage, make_backend, prepared

from .counts import positive_float, positive_int

SHAPES = {
    "7b": ("openai/whisper-large-v3-turbo", "Qwen/Qwen2-VL-7B-Instruct"),
    "2b": ("openai/whisper-large-v3-turbo", "Qwen/Qwen2-VL-2B-Instruct"),
    "tiny": ("bundled", "bundled"),
}
TINY_LAYERS = 2
FRAMES_PER_S = 100
PROMPT_TOKENS = 16
LABELS_PER_S = 3.0  # speech in lower case
WARMUP_STEPS = 3
BUDGETS = {"7b": [2048, 4096, 8192, 16384], "2b": [4096, 8192, 16384, 32768], "tiny": [512, 1024]}


@dataclass(frozen=True)
class Row:
    """What was measured for one stage and one token budget; MFU is None where the device's peak is not known, memory off a GPU."""

    stage: int
    token_budget: int
    samples_per_s: float
    clips: int
    tokens: int
    step_s: float
    tflops_per_s: float
    mfu: float | None
    memory_gb: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a row for each stage and token budget; exit code 2 and one line on stderr for what a user can mend."""
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    name = describe(device)
    asked = f"{arguments.shape}, {arguments.clip_s:g} s clips, {arguments.dtype}, {arguments.attention}"
    print(f"{asked}, {name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(
        f"{'':<7}{'budget':>8}{'samples/s':>11}{'clips':>7}{'tokens':>8}{'s/step':>9}{'TFLOP/s':>9}{'MFU':>7}{'GB':>8}",
        flush=True,
    )
    rows = []
    try:
        for row in _measure(arguments, device, device_peak_flops(name)):
            print(_line(row), flush=True)
            rows.append(row)
        if arguments.json:
            write_rows(arguments, name, [asdict(row) for row in rows])
    except (GraftError, torch.OutOfMemoryError) as error:
        print(f"graft: error: {error}", file=sys.stderr)
        return 2
    return 0


def describe(device: torch.device) -> str:
    """The name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def write_rows(arguments: argparse.Namespace, device: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write what was found to the file that `--json` names, with what was asked for, of which device, and when. Raises OutputError."""
    found = vars(arguments) | {
        "device": device,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    try:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    except OSError as error:
        raise OutputError(
            f"{arguments.json} cannot be written: {error.strerror or error}: name another --json file"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmarks.gpu", description="Measure training steps on this machine's GPU."
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="default: %(default)s")
    parser.add_argument("--stage", type=int, choices=(1, 2), nargs="+", default=[1, 2], help="default: both")
    parser.add_argument(
        "--seconds", type=positive_float, default=10.0, help="how long to measure each row (default: %(default)s)"
    )
    parser.add_argument(
        "--budgets",
        type=positive_int,
        nargs="+",
        metavar="TOKENS",
        help="padded tokens of a batch (default: some for the shape)",
    )
    parser.add_argument("--clip-s", type=positive_float, default=10.0, help="seconds of a clip (default: %(default)s)")
    parser.add_argument("--rank", type=positive_int, default=64, help="of stage 2's adapters (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument(
        "--attention", choices=("sdpa", "flash_attention_2", "eager"), default="sdpa", help="default: %(default)s"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile the layers (the first steps then take minutes)")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    return parser


def _measure(arguments: argparse.Namespace, device: torch.device, peak_flops: float | None) -> Iterator[Row]:
    config = bench_config(arguments.shape)
    computing = ComputeSettings(
        dtype=arguments.dtype,
        attention=arguments.attention,
        gradient_checkpointing=arguments.gradient_checkpointing,
        compile=arguments.compile,
    )
    for stage in arguments.stage:
        lora = LoraSettings(rank=arguments.rank) if stage == 2 else None
        model = random_stage(config, computing, lora, device)
        backend = make_backend(model, computing, accumulation=1, weight_decay=0.0, max_grad_norm=1.0)
        for budget in arguments.budgets or BUDGETS[arguments.shape]:
            inputs, flops = synthetic_batch(
                config, budget, arguments.clip_s, lora=lora, computing=computing, device=device
            )
            try:
                yield _row(
                    backend, inputs, flops, stage=stage, budget=budget, seconds=arguments.seconds, peak_flops=peak_flops
                )
            except torch.OutOfMemoryError:
                print(f"stage{stage}{budget:>9}   the device's memory ran out", flush=True)
                break
        del model, backend, inputs
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def bench_config(shape: str) -> GraftConfig:
    """The configuration of a shape, with 25 audio tokens a second; the tiny one has the bundled pair's width and two layers."""
    audio_base, text_base = SHAPES[shape]
    audio, text = dict(AUDIO_BASES[audio_base]), dict(TEXT_BASES[text_base])
    ids = {}
    if shape == "tiny":
        audio["encoder_layers"] = TINY_LAYERS
        text["text_config"] = text["text_config"] | {"num_hidden_layers": TINY_LAYERS}
        first = text["text_config"]["vocab_size"] - 3
        ids = {"audio_token_id": first, "audio_start_token_id": first + 1, "audio_end_token_id": first + 2}
    return GraftConfig(audio_config=audio, **text, **ids)


def random_stage(
    config: GraftConfig, computing: ComputeSettings, lora: LoraSettings | None, device: torch.device
) -> GraftForConditionalGeneration:
    """A stage's model with random weights, made on the device in the dtype of training."""
    with device:
        model = GraftForConditionalGeneration._from_config(
            config, dtype=DTYPES[computing.dtype], attn_implementation=computing.attention
        )
    return prepared(model, Stage(2 if lora else 1, lora=lora), computing)


def synthetic_batch(
    config: GraftConfig,
    budget: int,
    clip_s: float,
    *,
    lora: LoraSettings | None,
    computing: ComputeSettings,
    device: torch.device,
) -> tuple[dict[str, Tensor], float]:
    """As many clips of one length as the budget holds, at least one, with random words; and the FLOPs of a step on them."""
    frames = round(clip_s * FRAMES_PER_S)
    audio_tokens, labels = (
        audio_token_count(frames, pool=config.audio_pool, context=config.audio_context),
        round(clip_s * LABELS_PER_S),
    )
    tokens = PROMPT_TOKENS + audio_tokens + labels
    clips = max(1, budget // tokens)
    ids = torch.randint(10, 1000, (clips, tokens), device=device)
    ids[:, 5 : 5 + audio_tokens] = config.audio_token_id
    is_label = torch.arange(tokens, device=device) >= tokens - labels
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(is_label, ids, -100),
        "input_features": torch.rand(clips, config.audio_config.num_mel_bins, min(frames + 2, 3000), device=device)
        - 0.5,
        "audio_frame_counts": torch.full((clips,), frames, device=device),
    }
    flops = batch_flops(
        config,
        token_counts=[tokens] * clips,
        label_count=labels * clips,
        frame_counts=[frames] * clips,
        lora_rank=lora.rank if lora else None,
        gradient_checkpointing=computing.gradient_checkpointing,
    )
    return inputs, flops


def _row(
    backend: Backend,
    inputs: dict[str, Tensor],
    flops: float,
    *,
    stage: int,
    budget: int,
    seconds: float,
    peak_flops: float | None,
) -> Row:
    device = inputs["input_ids"].device
    label_count = int((inputs["labels"] != -100).sum())

    def step() -> None:
        backend.backward(inputs, label_count=label_count, is_last=True)
        backend.step(1e-4)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_s = _seconds_each(step, seconds, device)
    clips, tokens = inputs["input_ids"].shape
    return Row(
        stage=stage,
        token_budget=budget,
        samples_per_s=clips / step_s,
        clips=clips,
        tokens=clips * tokens,
        step_s=step_s,
        tflops_per_s=flops / step_s / 1e12,
        mfu=flops / step_s / peak_flops if peak_flops else None,
        memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    )


def _seconds_each(step: Callable[[], None], seconds: float, device: torch.device) -> float:
    """The mean time of a step, which ends with the device's work (the gradient's norm is read), after a warm-up."""
    for _ in range(WARMUP_STEPS):
        step()
    started, count = time.perf_counter(), 0
    while not count or time.perf_counter() - started < seconds:
        step()
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / count


def _line(row: Row) -> str:
    mfu = "-" if row.mfu is None else f"{row.mfu:.1%}"
    memory = "-" if row.memory_gb is None else f"{row.memory_gb:.1f}"
    shares = f"{row.tokens:>8}{row.step_s:>9.3f}{row.tflops_per_s:>9.1f}{mfu:>7}{memory:>8}"
    return f"stage{row.stage} {row.token_budget:>8}{row.samples_per_s:>11.2f}{row.clips:>7}{shares}"


if __name__ == "__main__":
    sys.exit(main())
