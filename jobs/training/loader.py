"""Make batches that were read into blocks of arrays in Ray Data's actors, and blocks into batches on a worker's device.

ReadBatch -> decode, augment, featurize, pad -> block of arrays -> TrainingBatch
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.audio.features import HOP_LENGTH, MIN_FRAMES, Features
from graft.data.augmentation import Augmenter, no_speech_clip
from graft.data.dataset import RowTable
from graft.data.row_groups import StoredAudio
from graft.data.sample_seeds import generator
from graft.data.settings import AugmentRecipe
from graft.errors import AudioError, DataError
from graft.processor import Example, read_graft_processor
from graft.text.prompts import Instruction
from graft.training.backends import TrainingBatch
from graft.training.encoder_cache import CachingEncoder, EncoderCache
from graft.training.plan import Batches

from .reader import BatchReader, ReadBatch, ReaderSpec, ReadSample
from .samples import NO_VARIATION, Variation

MAX_DECODED_S = 60.0
"""Seconds of a clip that are decoded before it counts as too long; data may say less than a file holds."""
FRAMES_PER_S = SAMPLE_RATE // HOP_LENGTH
_TENSORS = ("input_ids", "attention_mask", "labels", "input_features", "audio_frame_counts")


@dataclass(frozen=True, eq=False)
class LoaderSpec:
    """All that is needed to read and load a batch by its number."""

    rows: RowTable
    batches: Batches
    processor: str
    """Folder or hub id of the processor."""
    variation: Variation = NO_VARIATION
    encoder_cache: EncoderCache | None = None
    """Cache in which clips are looked up before they are decoded."""
    epoch_windows: int = 1
    """Number of windows of an epoch, over which a large noise corpus is spread."""
    token_budget: int | None = None
    """Most tokens of a batch, as planned; clips that are longer than the data says are masked beyond it. None for no
    limit."""

    @property
    def reader(self) -> ReaderSpec:
        """The reader's part."""
        return ReaderSpec(self.rows, self.batches, self.variation, self.epoch_windows)

    def without_rows(self) -> "LoaderSpec":
        """Leave out what the reader looks up in the corpora; any loader can hold the rest."""
        variation = replace(self.variation, no_speech_s=NO_VARIATION.no_speech_s, noise=None)
        return replace(self, rows=self.rows.select(np.zeros(0, int)), batches=self.batches[:0], variation=variation)


@dataclass(frozen=True)
class Sample:
    """An example of a batch, with its clip's id and length."""

    example: Example
    id: str
    duration_s: float = 0.0
    fault: str | None = None
    """Reason why the clip is masked; None for a clip that counts."""
    key: str = ""
    """Key of the clip in the encoder cache."""
    states: Tensor | None = None
    """Encoder states (tokens, d_model) from the cache; the example's features are empty then."""

    @property
    def token_count(self) -> int:
        return len(self.example.prompt_ids) + len(self.example.target_ids)


class BatchLoader:
    """Decodes, augments, featurizes and pads the clips of batches; it does not depend on Ray."""

    def __init__(self, spec: LoaderSpec):
        self.spec = spec
        self.processor = read_graft_processor(spec.processor)
        self.augmenter = Augmenter(spec.variation.augment or AugmentRecipe())
        self.cache = spec.encoder_cache
        self.no_mel = np.zeros((self.processor.featurizer.mel_count, 0), np.float32)

    @functools.cached_property
    def reader(self) -> BatchReader:
        """The reader of a loader that reads its own batches, as in validation."""
        return BatchReader(self.spec.reader)

    def block(self, batch: ReadBatch) -> dict[str, np.ndarray]:
        """Make a batch a block of one row."""
        return {name: value[None] for name, value in self.arrays(batch).items()}

    def blocks(self, numbers: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """Read and make batches by their ascending numbers; a row group is read once for each window."""
        batches = (self.spec.batches[number] for number in numbers)
        for _, window in itertools.groupby(batches, key=lambda batch: batch.window):
            yield from map(self.block, self.reader.read(list(window)))

    def arrays(self, batch: ReadBatch) -> dict[str, np.ndarray]:
        """Make a batch: the model's inputs and the plan's numbers as arrays, ids and masked clips as JSON."""
        most = self._most_tokens(len(batch.samples))
        samples = [self._noise_decoder_inputs(self._fitting_sample(read, most), read) for read in batch.samples]
        samples = samples or [self._masked("")]
        counted = [sample for sample in samples if sample.example.target_ids]
        inputs = self.processor.training_batch([sample.example for sample in samples])
        return {
            **(inputs if self.cache is None else _with_states(inputs, samples)),
            "position": np.array(batch.position),
            "step_position": np.array(batch.step_position),
            "step_label_count": np.array(batch.step_label_count),
            "ids": np.array(json.dumps([sample.id for sample in counted])),
            "token_count": np.array(sum(sample.token_count for sample in counted)),
            "audio_s": np.array(sum(sample.duration_s for sample in counted)),
            "skipped": np.array(
                json.dumps([{"id": sample.id, "reason": sample.fault} for sample in samples if sample.fault])
            ),
        }

    def _most_tokens(self, clip_count: int) -> float:
        """Return the most tokens that each of so many clips may have; the plan's count may be one too low."""
        if self.spec.token_budget is None or not clip_count:
            return math.inf
        return self.spec.token_budget // clip_count + 1

    def _fitting_sample(self, read: ReadSample, most: float) -> Sample:
        """Make a sample, masked where it has more than `most` tokens: the clip is longer than the data says."""
        sample = self._sample(read)
        if sample.token_count <= most:
            return sample
        fault = (
            f"lasts {sample.duration_s:.2f} s where the data says {read.duration_s:.2f} s, so that its batch would "
            f"exceed token_budget={self.spec.token_budget}"
        )
        return self._masked(read.id, fault)

    def _sample(self, read: ReadSample) -> Sample:
        try:
            if self.cache and read.audio:
                return self._cached(self.cache, read, read.audio)
            clip = self._clip(read)
            example = self.processor.example(clip, read.text, self._instruction(read))
        except (AudioError, DataError) as error:
            return self._masked(read.id, str(error))
        example = replace(example, features=self.augmenter.features(example.features, read.sample_seed))
        return Sample(example, read.id, clip.duration_s)

    def _instruction(self, read: ReadSample) -> Instruction:
        return self.spec.variation.instruction(read.text, read.sample_seed, read.language)

    def _clip(self, read: ReadSample) -> AudioClip:
        """Decode and augment a clip, or make one without speech."""
        if read.audio is None:
            return no_speech_clip(read.duration_s, read.sample_seed, read.noise)
        clip = read.audio.clip(max_s=MAX_DECODED_S)
        return self.augmenter.clip(clip, read.sample_seed, duration_s=read.duration_s, noise=read.noise)

    def _cached(self, cache: EncoderCache, read: ReadSample, audio: StoredAudio) -> Sample:
        """Make the sample of an unaugmented clip, which is decoded only where the cache does not have it."""
        key = cache.key(audio.content)
        encoded = None if audio.fault else cache.get(key)
        if encoded:
            features = Features(self.no_mel, encoded.frame_count)
        else:
            features = self.processor.featurizer(audio.clip(max_s=MAX_DECODED_S))
        example = self.processor.example_from_features(features, read.text, self._instruction(read))
        states = encoded.states if encoded else None
        return Sample(example, read.id, features.frame_count / FRAMES_PER_S, key=key, states=states)

    def _noise_decoder_inputs(self, sample: Sample, read: ReadSample) -> Sample:
        """Replace a share of the answer's input tokens by tokens of another clip's answer; the last token stays."""
        share, target_ids = self.spec.variation.token_noise, sample.example.target_ids
        if not share or not target_ids:
            return sample
        rng = generator(read.sample_seed, "text noise")
        *others, _ = self.processor.target_ids(read.other_text)
        swapped = np.append(rng.random(len(target_ids) - 1) < share, False)
        decoder_input_ids = np.where(swapped, rng.choice(others, len(target_ids)), target_ids).tolist()
        return replace(sample, example=replace(sample.example, decoder_input_ids=decoder_input_ids))

    def _masked(self, name: str, fault: str | None = None) -> Sample:
        """Make the shortest silence without an answer, which replaces an unreadable clip and fills up steps."""
        features = self.processor.featurizer(AudioClip(np.zeros(MIN_FRAMES * HOP_LENGTH, np.float32)))
        return Sample(Example(features, self.processor.prompt_ids(features.frame_count), []), name, fault=fault)


def _with_states(inputs: dict[str, np.ndarray], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Add cached states to a batch, end to end, and keep the features of the other clips only.

    The states are viewed as 16 or 32 bit integers, because numpy has no bfloat16.
    """
    missing = [index for index, sample in enumerate(samples) if sample.states is None]
    states = [sample.states for sample in samples if sample.states is not None]
    found = torch.cat(states) if states else torch.zeros(0, 1)  # (cached tokens, d_model)
    token_counts = [len(sample.states) if sample.states is not None else None for sample in samples]
    return {
        **inputs,
        "input_features": inputs["input_features"][missing],
        "cached_states": found.view(torch.int16 if found.dtype == torch.bfloat16 else torch.int32).numpy(),
        "cached_token_counts": np.array(json.dumps(token_counts)),
        "cache_keys": np.array(json.dumps([sample.key for sample in samples])),
    }


def training_batches(
    blocks: Iterable[Mapping[str, np.ndarray]],
    device: torch.device,
    skipped: list[dict[str, str]],
    *,
    encoder: CachingEncoder | None = None,
    cost: Callable[[Mapping[str, np.ndarray]], float] | None = None,
) -> Iterator[TrainingBatch]:
    """Turn blocks into batches on a device; masked clips are appended to `skipped`.

    `encoder` encodes the clips that its cache did not have; `cost` computes a block's FLOPs.
    """
    for block in blocks:
        masked = json.loads(str(block["skipped"][0]))
        skipped += masked
        ids = tuple(json.loads(str(block["ids"][0])))
        inputs = {name: torch.tensor(block[name][0], device=device) for name in _TENSORS}
        encode = None
        if encoder:
            features, counts, keys = (
                inputs.pop("input_features"),
                inputs["audio_frame_counts"],
                json.loads(str(block["cache_keys"][0])),
            )
            encode = functools.partial(encoder, features, counts, keys, _cached_states(block, device))
        yield TrainingBatch(
            inputs=inputs,
            position=int(block["position"][0]),
            step_position=int(block["step_position"][0]),
            step_label_count=int(block["step_label_count"][0]),
            ids=ids,
            clip_count=len(ids),
            token_count=int(block["token_count"][0]),
            audio_s=float(block["audio_s"][0]),
            masked=tuple(f"{clip['id']}: {clip['reason']}" for clip in masked),
            flops=cost(block) if cost else 0.0,
            encode=encode,
        )


def prefetch(batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
    """Make the next batch in a thread during a step; copying it to the device takes a few percent of a step."""
    thread, end = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-ahead"), None
    try:
        coming = thread.submit(next, batches, end)
        while (batch := coming.result()) is not end:
            coming = thread.submit(next, batches, end)
            yield batch
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _cached_states(block: Mapping[str, np.ndarray], device: torch.device) -> dict[int, Tensor]:
    """Undo _with_states: return the cached states (tokens, d_model) by the clip's index."""
    array = block["cached_states"][0]
    states = torch.tensor(array, device=device).view(torch.bfloat16 if array.dtype == np.int16 else torch.float32)
    token_counts = enumerate(json.loads(str(block["cached_token_counts"][0])))  # null for a clip that was not found
    lengths = {index: count for index, count in token_counts if count is not None}
    return dict(zip(lengths, states.split(list(lengths.values())), strict=True)) if lengths else {}
