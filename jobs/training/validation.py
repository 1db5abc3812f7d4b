"""Validate a model during training: its loss and transcripts on other clips, divided among the workers."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft.audio.clip import AudioClip, read_audio
from graft.data.dataset import RowReader, RowTable
from graft.errors import AudioError, DataError
from graft.model.ctc import CtcPrealignment
from graft.processor import GraftProcessor
from graft.training.backends import Backend
from graft.training.loop import Observer, naming_clips
from graft.training.meter import masked_share

from .loader import BatchLoader, LoaderSpec, training_batches
from .samples import MAX_DURATION_S


@dataclass(frozen=True)
class TranscribedClip:
    """A clip's reference text, what the model heard, and the language (ISO 639-1), None where it is not known."""

    id: str
    text: str
    heard: str
    language: str | None = None


class Validation:
    """Measures the loss on this worker's share of a set's clips, and transcribes the first `samples` of all.

    Clips of several languages are transcribed in turns, so that each language has its share. With sharded weights
    (`is_sharded`) all workers generate every transcript together, otherwise each its share. `masked` lists this
    worker's clips that cannot be read. Raises DataError where these are more than the share `max_masked` of all
    workers' clips; it names the set by its `key` in the recipe.
    """

    def __init__(
        self,
        spec: LoaderSpec,
        backend: Backend,
        processor: GraftProcessor,
        *,
        samples: int,
        is_sharded: bool,
        max_masked: float,
        key: str = "validation.data",
    ):
        self.backend, self.processor = backend, processor
        self.model: Any = backend.model
        self.device = next(backend.model.parameters()).device
        self.is_sharded = is_sharded
        rank, workers = rank_and_world_size()
        loader = BatchLoader(spec)
        self.batches = list(loader.blocks(range(rank, len(spec.batches), workers)))
        self.masked = _check_masked(self.batches, max_masked, key)
        rows = spec.rows.select(_by_turns(spec.rows.language))
        of_all = itertools.islice(readable_rows(rows, RowReader(rows.files), max_s=MAX_DURATION_S), samples)
        own = of_all if is_sharded else itertools.islice(of_all, rank, None, workers)
        self.samples = [(rows.id(row), rows.text(row), rows.language_of(row), clip) for row, clip in own]

    def summed_loss(self) -> tuple[float, float]:
        """Sum the loss of all labels over all workers' clips; returns the sum and the number of labels."""
        with self.backend.evaluating():
            sums = summed_loss(self.model, self.batches)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        loss, label_count = sums.tolist()
        return loss, label_count

    def transcripts(self) -> list[TranscribedClip]:
        """Transcribe the samples greedily, by the language model or by CTC; every worker returns all transcripts."""
        decode = self._ctc_transcript if isinstance(self.model, CtcPrealignment) else self._transcript
        samples = []
        for name, text, language, clip in self.samples:
            inputs = self.processor(audio=clip).to(self.device)
            with self.backend.evaluating():
                samples.append(TranscribedClip(name, text, decode(inputs, clip.duration_s), language))
        if self.is_sharded:
            return samples
        shares: list[Any] = [samples] * rank_and_world_size()[1]
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(shares, samples)
        # One sample of each worker in turn restores their order.
        return [sample for turn in itertools.zip_longest(*shares) for sample in turn if sample is not None]

    def _transcript(self, inputs: Mapping[str, Tensor], duration_s: float) -> str:
        limits = {"max_new_tokens": self.processor.max_new_tokens(duration_s), "synced_gpus": self.is_sharded}
        # torch.compile would compile a layer again for each layer's index in the cache, and soon reach its limit.
        with torch.compiler.set_stance("force_eager"):
            ids = self.model.generate(**inputs, do_sample=False, **limits)
        return self.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _ctc_transcript(self, inputs: Mapping[str, Tensor], duration_s: float) -> str:
        return self.model.greedy_decode(inputs["input_features"], inputs["audio_frame_counts"])[0]


def _by_turns(groups: np.ndarray) -> np.ndarray:
    """Order rows so that their groups take turns; the rows of a group keep their order: int (rows,)."""
    order = np.argsort(groups, kind="stable")
    _, first, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    turns = np.empty(len(groups), int)
    turns[order] = np.arange(len(groups)) - np.repeat(first, sizes)
    return np.argsort(turns, kind="stable")


def _check_masked(blocks: Iterable[Mapping[str, np.ndarray]], max_masked: float, key: str) -> list[dict[str, str]]:
    own: list[dict[str, str]] = []
    seen = 0
    for block in blocks:
        masked = json.loads(str(block["skipped"][0]))
        own += masked
        seen += len(masked) + len(json.loads(str(block["ids"][0])))
    shares: list[Any] = [(own, seen)] * rank_and_world_size()[1]
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(shares, (own, seen))
    reasons = [f"{clip['id']}: {clip['reason']}" for masked, _ in shares for clip in masked]
    if len(reasons) > max_masked * (total := sum(count for _, count in shares)):
        raise DataError(
            f"{key}: {masked_share(reasons, len(reasons), total)}, and max_masked={max_masked:g} is the "
            "largest share that may be masked: repair the data, or raise max_masked"
        )
    return own


def read_clips(rows: RowTable) -> tuple[dict[int, AudioClip], dict[str, str]]:
    """Read clips of at most 30 s; returns those that can be used by their row, and the others' faults by their id."""
    reader, clips, faults = RowReader(rows.files), {}, {}
    for row in range(len(rows)):
        try:
            clips[row] = _read(rows, row, reader, MAX_DURATION_S)
        except (AudioError, DataError) as error:
            faults[rows.id(row)] = str(error)
    return clips, faults


def readable(rows: RowTable, reader: RowReader, *, max_s: float | None = None) -> Iterator[tuple[str, str, AudioClip]]:
    """Yield id, text and audio of the clips that can be read and last `max_s` at most; the loss masks others, too."""
    for row, clip in readable_rows(rows, reader, max_s=max_s):
        yield rows.id(row), rows.text(row), clip


def readable_rows(rows: RowTable, reader: RowReader, *, max_s: float | None = None) -> Iterator[tuple[int, AudioClip]]:
    """Yield the numbers and the audio of the rows that can be read and last `max_s` at most."""
    for row in range(len(rows)):
        with contextlib.suppress(AudioError, DataError):
            yield row, _read(rows, row, reader, max_s)


def _read(rows: RowTable, row: int, reader: RowReader, max_s: float | None) -> AudioClip:
    wav, path = reader.wav(rows.file[row], rows.row_group[row], rows.row[row])
    return read_audio(wav, name=path or rows.id(row), max_s=max_s)


def summed_loss(model: Any, blocks: Iterable[Mapping[str, np.ndarray]]) -> Tensor:
    """Sum over the blocks of batches the loss of all labels, and the number of labels; returns float64 (2,)."""
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in training_batches(blocks, device, []):
        with naming_clips([batch], Observer()):
            sums[0] += model(**batch.inputs, label_count=1).loss
        sums[1] += (batch.inputs["labels"] != -100).sum()
    return sums


def rank_and_world_size() -> tuple[int, int]:
    """Return this worker's rank, and the number of workers."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
