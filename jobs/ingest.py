"""The plan's batches through Ray Data: a range of numbers becomes, on CPU workers, one packed batch a block, in order.

`ray.data.range` with a block for each number fuses with the loader actors; with order preserved, number i reaches worker i mod workers.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graft.audio import SAMPLE_RATE, AudioClip, read_audio
from graft.corpus import RowReader, RowTable
from graft.errors import AudioError, DataError
from graft.processor import Example, GraftProcessor
from graft.training.loop import TrainingBatch
from graft.training.plan import PlanColumns, PlannedBatch
from jobs.remote import LoadBatches

MAX_DURATION_S = 30.0
_TENSORS = ("input_ids", "attention_mask", "labels", "input_features", "audio_frame_counts")


@dataclass(frozen=True, eq=False)
class Delivery:
    """What the loaders need besides a batch's number: the corpus, what is delivered, and the processor's folder."""

    rows: RowTable
    batches: Sequence[PlannedBatch]
    filler_row: int
    processor: str


def plan_columns(rows: RowTable, processor: GraftProcessor) -> PlanColumns:
    """Count each row's tokens and label tokens. Raises DataError for rows without text and clips over 30 s, naming the first."""
    _refuse([row for row, text in enumerate(rows.texts) if not text.strip()], rows, "no text")
    _refuse(np.flatnonzero(rows.duration_s > MAX_DURATION_S).tolist(), rows, f"audio over {MAX_DURATION_S:.0f} s")
    label_counts = np.array([len(processor.target_ids(text)) for text in rows.texts])
    prompt_length = len(processor.prompt_ids(8)) - processor.audio_token_count(8)
    frame_counts = np.clip(np.ceil(rows.duration_s * 100), 8, 3000).astype(int)
    audio_counts = np.array([processor.audio_token_count(count) for count in frame_counts])
    row_groups = np.unique(np.stack([rows.file, rows.row_group]), axis=1, return_inverse=True)[1]
    return PlanColumns(prompt_length + audio_counts + label_counts, label_counts, row_groups)


def _refuse(faulty: list[int], rows: RowTable, reason: str) -> None:
    if faulty:
        raise DataError(
            f"{len(faulty)} of {len(rows)} rows have {reason}, {rows.ids[faulty[0]]} first: drop them with python -m jobs.prepare"
        )


class BatchLoader:
    """Reads, decodes, featurizes and packs planned batches; a callable for Ray Data, and for tests without it."""

    def __init__(self, delivery: Delivery):
        torch.set_num_threads(1)
        self.delivery = delivery
        self.processor = GraftProcessor.from_pretrained(delivery.processor)
        self.reader = RowReader(delivery.rows.uris)

    def __call__(self, block: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        (number,) = block["id"]
        return {name: value[None] for name, value in self.load(self.delivery.batches[int(number)]).items()}

    def load(self, planned: PlannedBatch) -> dict[str, np.ndarray]:
        """Load one batch: the model's inputs and the plan's numbers as arrays, and as JSON the clips that were masked, with reasons."""
        rows = self.delivery.rows
        skipped: list[dict[str, str]] = []
        examples = [self._example(row, skipped) for row in planned.rows]
        heard = [row for row, example in zip(planned.rows, examples, strict=True) if example.target_ids]
        if not examples:
            clip = self._example(self.delivery.filler_row, [])
            examples = [Example(clip.features, clip.prompt_ids, [])]
        return {
            **self.processor.training_batch(examples),
            "position": np.array(planned.position),
            "step_position": np.array(planned.step_position),
            "step_label_count": np.array(planned.step_label_count),
            "clip_count": np.array(len(heard)),
            "audio_s": np.array(rows.duration_s[heard].sum()),
            "skipped": np.array(json.dumps(skipped)),
        }

    def _example(self, row: int, skipped: list[dict[str, str]]) -> Example:
        rows = self.delivery.rows
        try:
            wav, path = self.reader.wav(int(rows.file[row]), int(rows.row_group[row]), int(rows.row[row]))
            return self.processor.example(read_audio(wav, name=path or rows.ids[row]), rows.texts[row])
        except (AudioError, DataError) as error:
            skipped.append({"id": rows.ids[row], "reason": str(error)})
            silence = AudioClip(np.zeros(SAMPLE_RATE, np.float32))
            features = self.processor.featurizer(silence)
            return Example(features, self.processor.prompt_ids(features.frame_count), [])


def planned_dataset(delivery: Delivery, *, data_workers: int) -> Any:
    """Make the Ray dataset that delivers planned batches in order, one a row and a block."""
    import ray

    count = len(delivery.batches)
    return ray.data.range(count, override_num_blocks=count).map_batches(
        LoadBatches,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=data_workers),
        num_cpus=1,
        fn_constructor_args=(ray.put(delivery),),
    )


def training_batches(
    blocks: Iterable[Mapping[str, np.ndarray]], device: torch.device, skipped: list[dict[str, str]]
) -> Iterator[TrainingBatch]:
    """Turn delivered blocks into batches on a device; clips that were masked are added to `skipped`."""
    for block in blocks:
        skipped += json.loads(str(block["skipped"][0]))
        yield TrainingBatch(
            inputs={name: torch.tensor(block[name][0], device=device) for name in _TENSORS},
            position=int(block["position"][0]),
            step_position=int(block["step_position"][0]),
            step_label_count=int(block["step_label_count"][0]),
            clip_count=int(block["clip_count"][0]),
            audio_s=float(block["audio_s"][0]),
        )
