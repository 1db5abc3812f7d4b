"""Compare the ways to use a stage 2: adapters on the NF4 base, adapters on the full-precision base, and merged.

Adapters that were trained on an NF4 base have adapted to its rounding, which the full-precision base does not have; the
comparison shows how much that matters.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from graft.audio.clip import AudioClip
from graft.checkpoints.loading import open_graft
from graft.data.dataset import RowTable, read_rows
from graft.data.settings import Sources
from graft.errors import DataError
from graft.inference.transcriber import make_transcriber
from graft.inference.transcript import Transcript
from graft.model.modeling import AnyGraft
from graft.processor import GraftProcessor
from graft.text.wer import Score, score
from graft.training.plan import PlanSettings

from ..training.loader import BatchLoader, LoaderSpec
from ..training.samples import plain_variation, plan_training, trainable
from ..training.validation import read_clips, summed_loss

TOKEN_BUDGET = 4096


def comparison_rows(data: Sources, clips: int) -> RowTable:
    """Return the first clips of the data, without their audio. Raises DataError where there is none."""
    rows, _ = trainable(read_rows(data))
    return rows.select(np.arange(min(clips, len(rows))))


def compare(
    stage: str, merged: Path, rows: RowTable, *, dtype: torch.dtype, device: str
) -> dict[str, dict[str, float]]:
    """Print and return the loss (nats per label token) and the WER of a stage's output and of the merged graft.

    Clips that cannot be read are left out and printed. Raises DataError where none can.
    """
    clips, faults = read_clips(rows)
    for name, fault in faults.items():
        print(f"merge: clip {name} is left out of the comparison: {fault}", flush=True)
    if not clips:
        raise DataError(f"none of {len(rows)} clips to compare on can be read, {next(iter(faults.values()))}")
    rows, heard = rows.select(np.array(list(clips))), list(clips.values())
    figures: dict[str, dict[str, float]] = {}
    print(f"{'weights':<24}{'clips':>6}{'loss':>9}{'WER':>8}  95 % interval")
    for name, model, processor in _variants(stage, merged, dtype=dtype, device=device):
        loss, scored = _loss(model, processor, rows, merged), _score(model, processor, rows, heard)
        figures[name] = {"loss": loss, "wer": scored.wer}
        print(
            f"{name:<24}{len(rows):>6}{loss:>9.4f}{scored.wer:>8.1%}  [{scored.wer_low:.1%}, {scored.wer_high:.1%}]",
            flush=True,
        )
    return figures


def _variants(
    stage: str, merged: Path, *, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, AnyGraft, GraftProcessor]]:
    """Open one model at a time: a large one leaves no room for two."""
    short = str(dtype).removeprefix("torch.")
    yield "adapters on NF4", *open_graft(stage, dtype=dtype, device=device, nf4=True)
    yield f"adapters on {short}", *open_graft(stage, dtype=dtype, device=device)
    yield "merged", *open_graft(merged, dtype=dtype, device=device)


def _loss(model: AnyGraft, processor: GraftProcessor, rows: RowTable, graft: Path) -> float:
    variation = plain_variation(processor)
    batches = plan_training(rows, processor, PlanSettings(token_budget=TOKEN_BUDGET), variation).batches(
        position=0, step_batches=1
    )
    loader = BatchLoader(LoaderSpec(rows, batches, str(graft), variation, token_budget=TOKEN_BUDGET))
    with torch.no_grad():
        total, count = summed_loss(model, loader.blocks(range(len(batches)))).tolist()
    return total / count


def _score(model: AnyGraft, processor: GraftProcessor, rows: RowTable, clips: Sequence[AudioClip]) -> Score:
    transcriber = make_transcriber(model, processor, name="compared")
    try:
        transcripts = transcriber.transcribe_many(clips)
    finally:
        transcriber.close()
    texts = [transcript.text for transcript in transcripts if isinstance(transcript, Transcript)]
    used = {rows.language_of(row) for row in range(len(rows))}
    return score(rows.texts.to_pylist(), texts, language=used.pop() if len(used) == 1 else None)
