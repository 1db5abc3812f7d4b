"""In fp32 nobody's text depends on who shares the batch: two hundred clips of speech, alone and in batches of any company and order."""

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
from graft.inference.transcriber import Transcriber, make_transcriber
from graft.inference.transcript import Segment
from tests.support import media, tiny_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLIPS = 200
SHORTEST_S, LONGEST_S = 0.3, 30.0
ENDS = range(40, 50)
"""Bytes that end an answer besides the token that should: so answers end anywhere, or go round in circles."""


@pytest.fixture(scope="module")
def clips() -> list[AudioClip]:
    """Of every length, in no order."""
    speech = media.speech(SAMPLE_RATE, seconds=200.0, channels=1)[:, 0]
    drawn = np.random.default_rng(0)
    lengths = drawn.permutation(np.geomspace(SHORTEST_S, LONGEST_S, CLIPS) * SAMPLE_RATE).astype(int)
    starts = (drawn.integers(len(speech) - length) for length in lengths)
    return [AudioClip(speech[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transcriber]:
    model, processor = open_graft(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("batching") / "graft"))
    torch.manual_seed(0)
    tiny_models.pay_attention(model)
    for name, parameter in model.named_parameters():  # or all answers to long clips are alike
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
    """Each clip's segment, when nobody else is there."""
    again = []
    stream = transcriber._engine.stream

    def listening(request):
        again.append(request.no_repeat_ngram > 0)
        return stream(request)

    transcriber._engine.stream = listening
    segments = [transcriber.transcribe(clip).segments[0] for clip in clips]
    transcriber._engine.stream = stream
    lengths = {len(segment.text) for segment in segments}
    cut = sum("truncated" in segment.flags for segment in segments)
    assert len({segment.text for segment in segments}) > CLIPS / 2
    assert len(lengths) > CLIPS / 4
    assert CLIPS / 20 < cut < CLIPS * 19 / 20
    assert CLIPS / 20 < sum(again) < CLIPS * 19 / 20  # decoded a second time: loops
    return segments


def differing(segments: Sequence[Segment], expected: Sequence[Segment]) -> list[tuple[str, str]]:
    """The texts that are not the same; flags and probabilities are, if those are."""
    for one, other in zip(segments, expected, strict=True):
        if one.text == other.text:
            assert one.flags == other.flags
            assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-4)
    return [(one.text, other.text) for one, other in zip(segments, expected, strict=True) if one.text != other.text]


@contextlib.contextmanager
def shared_steps(transcriber: Transcriber) -> Iterator[None]:
    """Whatever is heard here is heard in batches, in fact: a step gives a token to two rows or more, on average."""
    before = transcriber.counts()
    yield
    after = transcriber.counts()
    assert 0 < after.steps - before.steps < (after.tokens - before.tokens) / 2


@pytest.mark.parametrize("order", ["as they come", "longest first", "shuffled"])
def test_all_at_once_is_each_alone(
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


def test_batches_of_mixed_sizes_are_each_alone(
    transcriber: Transcriber, clips: Sequence[AudioClip], alone: Sequence[Segment]
) -> None:
    drawn = random.Random(2)
    places = drawn.sample(range(CLIPS), CLIPS)
    batches = []
    while places:
        size = drawn.choice([1, 2, 3, 7, 20, 45])
        batches.append(places[:size])
        places = places[size:]

    async def hear() -> dict[int, Segment]:
        """Three batches at a time, as a bulk worker has them."""
        heard = {}
        for first in range(0, len(batches), 3):
            together = batches[first : first + 3]
            chunks = [[Chunk(0.0, clips[place]) for place in batch] for batch in together]
            for batch, segments in zip(
                together, await asyncio.gather(*map(transcriber.transcribe_chunks, chunks)), strict=True
            ):
                heard |= zip(batch, segments, strict=True)
        return heard

    with shared_steps(transcriber):
        heard = asyncio.run(hear())
    assert differing([heard[place] for place in range(CLIPS)], alone) == []
