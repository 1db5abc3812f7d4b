"""Compare the ways to use a stage 2: adapters on the NF4 base, adapters on the full-precision base, and merged.

Adapters that were trained on an NF4 base have adapted to its rounding, which the full-precision base does not have; the
comparison shows how much that matters.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from graft.audio.clip import read_audio
from graft.checkpoints.loading import open_graft
from graft.data.dataset import RowReader, RowTable, read_rows
from graft.data.settings import Sources
from graft.inference.transcriber import make_transcriber
from graft.inference.transcript import Transcript
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import GraftProcessor
from graft.text.wer import Score, score
from graft.training.plan import PlanSettings

from ..training.loader import BatchLoader, LoaderSpec
from ..training.samples import plain_variation, plan_training, trainable
from ..training.validation import summed_loss

TOKEN_BUDGET = 4096


def compare(
    stage: str, merged: Path, data: Sources, *, clips: int, dtype: torch.dtype, device: str
) -> dict[str, dict[str, float]]:
    """Print and return the loss (nats per label token) and the WER of a stage's output and of the merged graft.

    They are measured on the first `clips` clips of the data.
    """
    rows, _ = trainable(read_rows(data))
    rows = rows.select(np.arange(min(clips, len(rows))))
    figures: dict[str, dict[str, float]] = {}
    print(f"{'weights':<24}{'clips':>6}{'loss':>9}{'WER':>8}  95 % interval")
    for name, model, processor in _variants(stage, merged, dtype=dtype, device=device):
        loss, scored = _loss(model, processor, rows, merged), _score(model, processor, rows)
        figures[name] = {"loss": loss, "wer": scored.wer}
        print(
            f"{name:<24}{len(rows):>6}{loss:>9.4f}{scored.wer:>8.1%}  [{scored.wer_low:.1%}, {scored.wer_high:.1%}]",
            flush=True,
        )
    return figures


def _variants(
    stage: str, merged: Path, *, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, GraftForConditionalGeneration, GraftProcessor]]:
    """Open one model at a time: a large one leaves no room for two."""
    short = str(dtype).removeprefix("torch.")
    yield "adapters on NF4", *open_graft(stage, dtype=dtype, device=device, nf4=True)
    yield f"adapters on {short}", *open_graft(stage, dtype=dtype, device=device)
    yield "merged", *open_graft(merged, dtype=dtype, device=device)


def _loss(model: GraftForConditionalGeneration, processor: GraftProcessor, rows: RowTable, graft: Path) -> float:
    variation = plain_variation(rows, processor)
    batches = plan_training(rows, processor, PlanSettings(token_budget=TOKEN_BUDGET), variation).batches(
        position=0, step_batches=1
    )
    loader = BatchLoader(LoaderSpec(rows, batches, str(graft), variation, token_budget=TOKEN_BUDGET))
    with torch.no_grad():
        total, count = summed_loss(model, loader.blocks(range(len(batches)))).tolist()
    return total / count


def _score(model: GraftForConditionalGeneration, processor: GraftProcessor, rows: RowTable) -> Score:
    reader = RowReader(rows.files)
    places = zip(rows.file, rows.row_group, rows.row, strict=True)
    transcriber = make_transcriber(model, processor, name="compared")
    try:
        transcripts = transcriber.transcribe_many([read_audio(reader.wav(*place)[0]) for place in places])
    finally:
        transcriber.close()
    texts = [transcript.text for transcript in transcripts if isinstance(transcript, Transcript)]
    used = {rows.language_of(row) for row in range(len(rows))}
    return score(rows.texts.to_pylist(), texts, language=used.pop() if len(used) == 1 else None)
