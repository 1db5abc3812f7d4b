"""Aligners open by name and give every segment its words; the Viterbi algorithm finds the best of all paths."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from graft.audio.chunking import windows
from graft.audio.clip import AudioClip
from graft.errors import ModelError
from graft.inference.aligners.ctc import best_paths
from graft.inference.aligners.loading import find_aligner, open_aligner
from graft.inference.aligners.protocol import spread_words
from graft.inference.segments import Segment, Word
from graft.inference.transcriber import Transcriber, open_transcriber
from graft.inference.transcript import Transcript
from serve.backends.local import LocalBackend
from serve.config import ServeArgs
from serve.http.schema import verbose_response
from serve.service import TranscriptionOptions
from tests.support import tiny_models
from tests.support.speech_corpus import save_tiny_whisper
from tests.support.spoken_words import VOCABULARY, in_order, save_ctc


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(3, 6), st.integers(0, 2**31), st.lists(st.booleans(), min_size=6, max_size=6))
def test_the_best_path_is_the_best_of_all(frames, states, seed, skips):
    may_skip = np.array(skips[:states])
    scores = np.random.default_rng(seed).normal(size=(2, frames, states))
    paths, totals = best_paths(scores, may_skip)
    for each, path, total in zip(scores, paths, totals, strict=True):
        possible = [one for one in itertools.product(range(states), repeat=frames) if _is_path(one, may_skip)]
        sums = [sum(each[frame, state] for frame, state in enumerate(one)) for one in possible]
        assert total == pytest.approx(max(sums, default=-np.inf))
        if possible:
            assert possible[int(np.argmax(sums))] == tuple(path)


def _is_path(path: Sequence[int], may_skip: np.ndarray) -> bool:
    steps = ((state - before, may_skip[state]) for before, state in itertools.pairwise(path))
    return (
        path[0] < 2
        and path[-1] >= len(may_skip) - 2
        and all(step in (0, 1) or (step == 2 and skip) for step, skip in steps)
    )


def test_words_are_spread_by_their_lengths():
    assert spread_words(["a", "bcd"], 2.0) == (Word(0.0, 0.5, "a"), Word(0.5, 2.0, "bcd"))
    assert spread_words([], 2.0) == ()


# Transcribers with an aligner


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("aligners")
    save_tiny_whisper(home / "tiny-whisper")
    GenerationConfig(decoder_start_token_id=3, no_timestamps_token_id=5).save_pretrained(home / "tiny-whisper")
    return {
        "graft": tiny_models.save_tiny_graft(home / "tiny-graft"),
        "whisper": home / "tiny-whisper",
        "ctc": save_ctc(home / "tiny-ctc", VOCABULARY),
    }


@pytest.fixture(scope="module")
def transcriber(folders) -> Iterator[Transcriber]:
    opened = open_transcriber(folders["graft"], chunker=windows, aligner=str(folders["whisper"]))
    yield opened
    opened.close()


def noise(seconds: float) -> AudioClip:
    return AudioClip(np.random.default_rng(1).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32))


def words_are_in_order(transcript: Transcript) -> bool:
    return all(
        "".join(word.text for word in segment.words) == "".join(segment.text.split())
        and in_order(segment.words, segment.text, segment.start_s, segment.end_s)
        for segment in transcript.segments
    )


@pytest.mark.bundled
def test_aligners_open_by_their_kind_and_are_named_by_it(folders, tmp_path):
    assert find_aligner("whisper") == ("whisper", "whisper-base, cross-attention")
    for kind, name in {"whisper": "tiny-whisper, cross-attention", "ctc": "tiny-ctc, CTC"}.items():
        assert open_aligner(str(folders[kind])).name == name
        assert find_aligner(str(folders[kind])) == (str(folders[kind]), name)
    with pytest.raises(ModelError, match="tiny-graft is a graft checkpoint, no aligner: give whisper, or"):
        open_aligner(str(folders["graft"]))
    with pytest.raises(ModelError, match=r"can't be read .*: give whisper, or a folder or hub id"):
        open_aligner(str(tmp_path))


def test_joined_words_are_the_text_in_recordings_over_30_s_too(transcriber):
    transcript = transcriber.transcribe(noise(32.0))
    assert len(transcript.segments) == 2
    assert words_are_in_order(transcript)
    assert sum(len(segment.words) for segment in transcript.segments) > 2
    assert transcript.aligner == "tiny-whisper, cross-attention"


def test_segments_have_words_when_asked_for(transcriber, folders):
    clip = noise(1.0)
    timed, plain = transcriber.transcribe(clip), transcriber.transcribe(clip, words=False)
    assert (plain.text, plain.aligner, plain.segments[0].words) == (timed.text, None, ())
    assert transcriber.transcribe_many([clip], words=True) == [timed]
    assert transcriber.transcribe_many([clip], words=False) == [plain]
    without = open_transcriber(folders["graft"], chunker=windows)
    assert without.transcribe(clip) == plain
    with pytest.raises(ModelError, match="without an aligner: load the model with aligner='whisper'"):
        without.transcribe(clip, words=True)
    without.close()


def test_the_service_times_words_with_its_aligner(folders):
    graft = str(folders["graft"])
    backend = LocalBackend.open(ServeArgs(model=graft, aligner=str(folders["ctc"])), graft)

    async def transcribe(*, words: bool) -> Segment:
        chunk, options = windows(noise(1.0))[0], TranscriptionOptions(word_timestamps=words)
        (segment,) = [part async for part in backend.transcribe_chunk(chunk, options, stream=False)]
        return segment

    async def ask() -> tuple[Segment, Segment]:
        assert (await backend.model_info()).supports_word_timestamps
        answers = await transcribe(words=True), await transcribe(words=False)
        await backend.close()
        return answers

    timed, plain = asyncio.run(ask())
    assert (plain.text, plain.words) == (timed.text, ())
    transcript = Transcript(timed.text, 1.0, (timed,), "m")
    assert words_are_in_order(transcript)
    response = verbose_response(transcript, granularities=["word"])
    assert [(word.word, word.start, word.end) for word in response.words] == [
        (word.text, word.start_s, word.end_s) for word in timed.words
    ]
