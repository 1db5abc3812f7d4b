"""`python -m jobs.benchmarks.engine --shape 7b`: how fast the transformers engine hears on this machine's GPU, without audio, weights or Ray.

Weights are random and made on the device, features are noise, clips are all of one length, answers as long as speech makes them. Needs
torch and transformers. `--shape tiny` runs anywhere.
"""

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from graft.audio.features import Features
from graft.checkpoints.loading import DTYPES
from graft.errors import GraftError
from graft.inference.engines.kv_cache import whole_columns
from graft.inference.engines.protocol import Engine, EngineRequest
from graft.inference.engines.transformers_engine import TransformersEngine
from graft.model.configuration import TAIL_FRAMES, WINDOW_FRAMES, GraftConfig, audio_token_count
from graft.model.modeling import GraftForConditionalGeneration
from graft.training.estimate import name_words

from .counts import positive_float, positive_int
from .gpu import FRAMES_PER_S, LABELS_PER_S, PROMPT_TOKENS, SHAPES, bench_config, describe, write_rows

CEILINGS = {
    ("h200",): {10.0: 1629.0, 30.0: 1660.0},
    ("a100", "40gb"): {10.0: 483.0, 30.0: 497.0},
}
"""Seconds of audio a second that are possible with the 7b shape at 25 Hz on a clip's own frames, 256 clips at a time, by words of a GPU's
name and by the clips' seconds: 2.27 TFLOP to encode 30 s and 0.68 to encode 10 s, 10.3 and 3.67 to read the prompt, and steps that read
14.1 GB of weights; 790 TFLOP/s and 4.8 TB/s on an H200, 312 and 1.555 on an A100 of 40 GB."""

HEADER = f"{'clip s':>6}{'clips':>7}{'prompt':>8}{'answer':>8}{'RTFx':>9}{'ceiling':>9}{'share':>7}{'rows':>7}{'busy':>7}{'GB':>7}"


@dataclass(frozen=True)
class Row:
    """What was measured with clips of one length; the ceiling is None where none is known, memory off a GPU."""

    clip_s: float
    clips: int
    prompt_tokens: int
    answer_tokens: int
    rtfx: float
    ceiling: float | None
    tokens_a_step: float
    """How many answers share a decode step, on average; the first token of each, which a prefill gives, is counted along."""
    busy: float
    """Share of the time that the engine works."""
    memory_gb: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a row for each length of clips; exit code 2 and one line on stderr for what a user can mend."""
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    name = describe(device)
    print(f"{arguments.shape}, {arguments.dtype}, {name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(HEADER, flush=True)
    rows = []
    try:
        for row in _measure(arguments, device, name):
            print(_line(row), flush=True)
            rows.append(row)
        if arguments.json:
            write_rows(arguments, name, [asdict(row) for row in rows])
    except (GraftError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"graft: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmarks.engine", description="Measure the transformers engine on this GPU."
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="default: %(default)s")
    parser.add_argument(
        "--clip-s", type=positive_float, nargs="+", default=[10.0, 30.0], help="seconds of a clip (default: 10 and 30)"
    )
    parser.add_argument(
        "--rounds", type=positive_float, default=4.0, help="how many batches are heard (default: %(default)s)"
    )
    parser.add_argument("--batch-clips", type=positive_int, default=256, help="decoded together (default: %(default)s)")
    parser.add_argument(
        "--prefill-tokens", type=positive_int, default=8_192, help="read between two steps (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    return parser


def _measure(arguments: argparse.Namespace, device: torch.device, name: str) -> Iterator[Row]:
    config = bench_config(arguments.shape)
    with device:
        model = GraftForConditionalGeneration._from_config(config, dtype=DTYPES[arguments.dtype]).eval()
    for clip_s in arguments.clip_s:
        request = _request(config, clip_s)
        tokens = arguments.batch_clips * whole_columns(len(request.prompt_ids) + request.max_new_tokens)
        budgets = {"max_batch_tokens": tokens, "max_prefill_tokens": arguments.prefill_tokens}
        count = max(1, round(arguments.rounds * arguments.batch_clips))
        with contextlib.closing(TransformersEngine(model, pad_id=0, eos_ids=(), **budgets)) as engine:
            asyncio.run(
                _hear_all(engine, request, count)
            )  # to warm up: steps become CUDA graphs when their shapes recur
            yield _row(
                engine, request, count, clip_s=clip_s, most=ceiling(arguments.shape, name, clip_s), device=device
            )


def _row(
    engine: Engine, request: EngineRequest, count: int, *, clip_s: float, most: float | None, device: torch.device
) -> Row:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before, start = engine.counts(), time.perf_counter()
    asyncio.run(_hear_all(engine, request, count))
    seconds, after = time.perf_counter() - start, engine.counts()
    return Row(
        clip_s=clip_s,
        clips=count,
        prompt_tokens=len(request.prompt_ids),
        answer_tokens=request.max_new_tokens,
        rtfx=count * clip_s / seconds,
        ceiling=most,
        tokens_a_step=(after.tokens - before.tokens) / max(1, after.steps - before.steps),
        busy=(after.busy_s - before.busy_s) / seconds,
        memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    )


def ceiling(shape: str, name: str, clip_s: float) -> float | None:
    """What is possible on a GPU of this name; None where that was not computed."""
    words = name_words(name)
    if shape != "7b" or "mig" in words:
        return None
    return next((most.get(clip_s) for card, most in CEILINGS.items() if words.issuperset(card)), None)


def _request(config: GraftConfig, clip_s: float) -> EngineRequest:
    """Noise, and a prompt with its places; the id is set for each clip."""
    frames = round(clip_s * FRAMES_PER_S)
    mel = (
        np.random.default_rng(0).random(
            (config.audio_config.num_mel_bins, min(frames + TAIL_FRAMES, WINDOW_FRAMES)), np.float32
        )
        - 0.5
    )
    audio = [config.audio_token_id] * audio_token_count(frames, pool=config.audio_pool, context=config.audio_context)
    words = list(range(10, 10 + PROMPT_TOKENS))
    return EngineRequest("", Features(mel, frames), [*words[:5], *audio, *words[5:]], round(clip_s * LABELS_PER_S))


async def _hear_all(engine: Engine, request: EngineRequest, count: int) -> None:
    async def hear(number: int) -> None:
        async for _ in engine.stream(replace(request, request_id=f"clip {number}")):
            pass

    await asyncio.gather(*map(hear, range(count)))


def _line(row: Row) -> str:
    most, share = ("-", "-") if row.ceiling is None else (f"{row.ceiling:.0f}", f"{row.rtfx / row.ceiling:.0%}")
    memory = "-" if row.memory_gb is None else f"{row.memory_gb:.1f}"
    sizes = f"{row.clip_s:>6g}{row.clips:>7}{row.prompt_tokens:>8}{row.answer_tokens:>8}"
    return f"{sizes}{row.rtfx:>9.1f}{most:>9}{share:>7}{row.tokens_a_step:>7.1f}{row.busy:>7.0%}{memory:>7}"


if __name__ == "__main__":
    sys.exit(main())
