"""In fp32 no text depends on the batch: two hundred clips of speech alone and in batches of all sizes and orders."""

import asyncio
import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from graft.audio.chunking import Chunk
from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.checkpoints.loading import open_graft
from graft.inference.segments import Segment
from graft.inference.transcriber import Transcriber, make_transcriber
from tests.support import media, tiny_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLIPS = 200
SHORTEST_S, LONGEST_S = 0.3, 30.0
ENDS = range(40, 50)
"""Bytes that end an answer besides the end token, so that answers end anywhere or loop."""


@pytest.fixture(scope="module")
def clips() -> list[AudioClip]:
    """Clips of all lengths, in random order."""
    speech = media.speech(SAMPLE_RATE, seconds=200.0, channels=1)[:, 0]
    generator = np.random.default_rng(0)
    lengths = generator.permutation(np.geomspace(SHORTEST_S, LONGEST_S, CLIPS) * SAMPLE_RATE).astype(int)
    starts = (generator.integers(len(speech) - length) for length in lengths)
    return [AudioClip(speech[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transcriber]:
    model, processor = open_graft(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("batching") / "graft"))
    torch.manual_seed(0)
    tiny_models.pay_attention(model)
    for name, parameter in model.named_parameters():  # otherwise all answers to long clips are equal
        if "audio_projector" in name and parameter.ndim > 1:
            parameter.data.normal_(std=3 / parameter.shape[1] ** 0.5)
        elif "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.data *= 3
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, *ENDS]
    opened = make_transcriber(model, processor, name="tiny")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def alone(transcriber: Transcriber, clips: Sequence[AudioClip]) -> list[Segment]:
    """The segment of each clip that is transcribed alone."""
    blocked = []
    stream = transcriber._engine.stream

    def recording_stream(request):
        blocked.append(request.no_repeat_ngram > 0)
        return stream(request)

    transcriber._engine.stream = recording_stream
    segments = [transcriber.transcribe(clip).segments[0] for clip in clips]
    transcriber._engine.stream = stream
    lengths = {len(segment.text) for segment in segments}
    cut = sum("truncated" in segment.flags for segment in segments)
    assert len({segment.text for segment in segments}) > CLIPS / 2
    assert len(lengths) > CLIPS / 4
    assert CLIPS / 20 < cut < CLIPS * 19 / 20
    assert CLIPS / 20 < sum(blocked) < CLIPS * 19 / 20  # chunks with loops, which are decoded twice
    return segments


def differing(segments: Sequence[Segment], expected: Sequence[Segment]) -> list[tuple[str, str]]:
    """Return the pairs of texts that differ; check that equal texts have equal flags and log-probabilities."""
    for one, other in zip(segments, expected, strict=True):
        if one.text == other.text:
            assert one.flags == other.flags
            assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-4)
    return [(one.text, other.text) for one, other in zip(segments, expected, strict=True) if one.text != other.text]


@contextlib.contextmanager
def shared_steps(transcriber: Transcriber) -> Iterator[None]:
    """Check that clips within the context share batches: a step gives a token to more than two rows on average."""
    before = transcriber.counts()
    yield
    after = transcriber.counts()
    assert 0 < after.steps - before.steps < (after.tokens - before.tokens) / 2


@pytest.mark.parametrize("order", ["as they come", "longest first", "shuffled"])
def test_all_clips_at_once_equal_each_alone(
    transcriber: Transcriber, clips: Sequence[AudioClip], alone: Sequence[Segment], order: str
) -> None:
    places = list(range(CLIPS))
    if order == "longest first":
        places.sort(key=lambda place: -len(clips[place].samples))
    elif order == "shuffled":
        random.Random(1).shuffle(places)
    with shared_steps(transcriber):
        transcripts = transcriber.transcribe_many([clips[place] for place in places])
    assert differing([transcript.segments[0] for transcript in transcripts], [alone[place] for place in places]) == []


def test_batches_of_mixed_sizes_equal_each_alone(
    transcriber: Transcriber, clips: Sequence[AudioClip], alone: Sequence[Segment]
) -> None:
    generator = random.Random(2)
    places = generator.sample(range(CLIPS), CLIPS)
    batches = []
    while places:
        size = generator.choice([1, 2, 3, 7, 20, 45])
        batches.append(places[:size])
        places = places[size:]

    async def transcribe() -> dict[int, Segment]:
        """Transcribe three batches at a time, as a bulk worker does."""
        segments_of = {}
        for first in range(0, len(batches), 3):
            together = batches[first : first + 3]
            chunks = [[Chunk(0.0, clips[place]) for place in batch] for batch in together]
            for batch, segments in zip(
                together, await asyncio.gather(*map(transcriber.transcribe_chunks, chunks)), strict=True
            ):
                segments_of |= zip(batch, segments, strict=True)
        return segments_of

    with shared_steps(transcriber):
        segments_of = asyncio.run(transcribe())
    assert differing([segments_of[place] for place in range(CLIPS)], alone) == []
