"""Load planned batches as blocks of arrays in Ray Data's actors, and turn blocks into batches on a worker's device."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from graft.audio.clip import SAMPLE_RATE, AudioClip, read_audio
from graft.audio.features import HOP_LENGTH, MIN_FRAMES, Features
from graft.data.augmentation import Augmenter, NoiseCorpus, no_speech_clip
from graft.data.dataset import RowReader, RowTable
from graft.data.sample_seeds import generator
from graft.data.settings import AugmentRecipe
from graft.errors import AudioError, DataError
from graft.processor import Example, GraftProcessor
from graft.text.prompts import Instruction
from graft.training.backends import TrainingBatch
from graft.training.encoder_cache import CachingEncoder, EncoderCache
from graft.training.plan import Batches, PlannedBatch

from .samples import NO_VARIATION, Variation

NO_SPEECH_ID = "no-speech"
FRAMES_PER_S = SAMPLE_RATE // HOP_LENGTH
_TENSORS = ("input_ids", "attention_mask", "labels", "input_features", "audio_frame_counts")


@dataclass(frozen=True, eq=False)
class LoaderSpec:
    """All that a loader needs to load a batch by its number."""

    rows: RowTable
    batches: Batches
    processor: str
    """Folder or hub id of the processor."""
    variation: Variation = NO_VARIATION
    cache_row_groups: int = 16
    """Number of row groups whose audio a loader holds; the plan's window lets it read each once per window."""
    encoder_cache: EncoderCache | None = None
    """Cache in which clips are looked up before they are decoded."""


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


class BatchLoader:
    """Reads, decodes, augments, featurizes and pads the clips of planned batches; it does not depend on Ray."""

    def __init__(self, spec: LoaderSpec):
        self.spec = spec
        self.processor = GraftProcessor.from_pretrained(spec.processor)
        self.reader = RowReader(spec.rows.files, cache_row_groups=spec.cache_row_groups)
        self.noise = NoiseCorpus(spec.variation.noise) if spec.variation.noise else None
        self.augmenter = Augmenter(spec.variation.augment or AugmentRecipe(), self.noise)
        self.cache = spec.encoder_cache
        self.no_mel = np.zeros((self.processor.featurizer.mel_count, 0), np.float32)

    def block(self, number: int) -> dict[str, np.ndarray]:
        """Load a batch by its number, as a block of one row."""
        return {name: value[None] for name, value in self.load(self.spec.batches[number]).items()}

    def load(self, planned: PlannedBatch) -> dict[str, np.ndarray]:
        """Load a batch: the model's inputs and the plan's numbers as arrays, ids and masked clips as JSON."""
        drawn = zip(planned.rows, planned.sample_seeds, strict=True)
        samples = [
            self._noise_decoder_inputs(self._sample(row, sample_seed), sample_seed) for row, sample_seed in drawn
        ] or [self._masked("")]
        counted = [sample for sample in samples if sample.example.target_ids]
        inputs = self.processor.training_batch([sample.example for sample in samples])
        return {
            **(inputs if self.cache is None else _with_states(inputs, samples)),
            "position": np.array(planned.position),
            "step_position": np.array(planned.step_position),
            "step_label_count": np.array(planned.step_label_count),
            "ids": np.array(json.dumps([sample.id for sample in counted])),
            "token_count": np.array(
                sum(len(sample.example.prompt_ids + sample.example.target_ids) for sample in counted)
            ),
            "audio_s": np.array(sum(sample.duration_s for sample in counted)),
            "skipped": np.array(
                json.dumps([{"id": sample.id, "reason": sample.fault} for sample in samples if sample.fault])
            ),
        }

    def _sample(self, row: int, sample_seed: int) -> Sample:
        rows = self.spec.rows
        speaks = row < len(rows)
        name, text = (rows.id(row), rows.text(row)) if speaks else (NO_SPEECH_ID, "")
        try:
            if self.cache and speaks:
                return self._cached(self.cache, row, name, text, sample_seed)
            clip = self._clip(row, sample_seed)
            example = self.processor.example(clip, text, self._instruction(row, text, sample_seed))
        except (AudioError, DataError) as error:
            return self._masked(name, str(error))
        example = replace(example, features=self.augmenter.features(example.features, sample_seed))
        return Sample(example, name, clip.duration_s)

    def _instruction(self, row: int, text: str, sample_seed: int) -> Instruction:
        language = self.spec.rows.language_of(row) if row < len(self.spec.rows) else None
        return self.spec.variation.instruction(text, sample_seed, language)

    def _clip(self, row: int, sample_seed: int) -> AudioClip:
        """Decode and augment a row's clip, or generate one without speech for a row after the table's last."""
        if row >= len(self.spec.rows):
            seconds = self.spec.variation.no_speech_s[row - len(self.spec.rows)]
            return no_speech_clip(float(seconds), sample_seed, self.noise)
        wav, path = self._file(row)
        clip = read_audio(wav, name=path)
        return self.augmenter.clip(clip, sample_seed, duration_s=float(self.spec.rows.duration_s[row]))

    def _file(self, row: int) -> tuple[bytes, str]:
        """Read a row's audio file; returns its bytes and its name."""
        rows = self.spec.rows
        wav, path = self.reader.wav(rows.file[row], rows.row_group[row], rows.row[row])
        return wav, path or rows.id(row)

    def _cached(self, cache: EncoderCache, row: int, name: str, text: str, sample_seed: int) -> Sample:
        """Make the sample of an unaugmented clip, which is decoded only where the cache does not have it."""
        wav, path = self._file(row)
        key = cache.key(wav)
        encoded = cache.get(key)
        features = (
            Features(self.no_mel, encoded.frame_count)
            if encoded
            else self.processor.featurizer(read_audio(wav, name=path))
        )
        example = self.processor.example_from_features(features, text, self._instruction(row, text, sample_seed))
        states = encoded.states if encoded else None
        return Sample(example, name, features.frame_count / FRAMES_PER_S, key=key, states=states)

    def _noise_decoder_inputs(self, sample: Sample, sample_seed: int) -> Sample:
        """Replace a share of the answer's input tokens by tokens of another clip's answer; the last token stays."""
        rows, share, target_ids = self.spec.rows, self.spec.variation.token_noise, sample.example.target_ids
        if not share or not target_ids:
            return sample
        rng = generator(sample_seed, "text noise")
        *others, _ = self.processor.target_ids(rows.text(int(rng.integers(len(rows)))))
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
        skipped += json.loads(str(block["skipped"][0]))
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
