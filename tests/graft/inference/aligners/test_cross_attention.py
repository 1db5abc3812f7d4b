"""Whisper's word times: real words at known times, pauses that belong to no word, and any text."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.checkpoints.bundled.cache import bundled_whisper
from graft.errors import AudioError, ModelError
from graft.inference.aligners.cross_attention import WhisperAligner
from graft.inference.aligners.protocol import spread_words
from graft.inference.segments import Word
from tests.support.speech_corpus import save_tiny_whisper
from tests.support.spoken_words import border_errors, concatenate, in_order, prompts, spoken

WORDS = [
    *("three", "saturday", "seven", "eight", "one", "monday", "nine", "four"),
    *("friday", "zero", "two", "thursday", "six", "five", "wednesday"),
]


@pytest.fixture(scope="module")
def whisper(bundled_weights) -> WhisperAligner:
    return WhisperAligner(bundled_whisper())


@pytest.mark.parametrize(
    ("pause_s", "noise", "style"),
    [(0.0, 0.0, str.lower), (0.05, 0.003, str.upper), (0.3, 0.01, str.capitalize)],
    ids=["no-pause", "upper-case", "noise"],
)
def test_concatenated_words_are_found_where_they_were_put(whisper, pause_s, noise, style):
    pieces = spoken(*WORDS)
    clip, text, spans = concatenate(pieces, [0.5, *[pause_s] * (len(WORDS) - 1), 0.5], noise=noise)
    words = whisper.align(clip, style(text))
    assert in_order(words, style(text), 0, clip.duration_s)
    errors = border_errors(words, pieces, spans)
    assert np.median(errors) < 0.05
    assert (errors < 0.1).mean() >= 0.8


def test_sentences_begin_and_end_where_they_were_put(whisper):
    pieces = prompts(8)
    clip, text, spans = concatenate(pieces, [0.3, 1.2, 0.25, 0.6, 0.15, 2.0, 0.4, 0.1, 0.8])
    words = whisper.align(clip, text)
    assert in_order(words, text, 0, clip.duration_s)
    errors = border_errors(words, pieces, spans)
    assert np.median(errors) < 0.03
    assert (errors < 0.1).mean() > 0.8


def test_a_text_of_more_letters_than_the_decoder_takes_is_read_in_whole_words(whisper):
    pieces = prompts(12)
    clip, text, spans = concatenate(pieces, [0.1] * 13)
    assert clip.duration_s < 30
    shouted = text.replace(" ", "!!! ")
    assert len(shouted) > 450
    words = whisper.align(clip, shouted)
    assert in_order(words, shouted, 0, clip.duration_s)
    assert np.median(border_errors(words, pieces, spans)) < 0.1


def test_a_pause_belongs_to_no_word(whisper):
    pieces = prompts(3)
    clip, text, spans = concatenate(pieces, [2.0, 3.0, 3.0, 2.0])
    words = whisper.align(clip, text)
    for (_, end_s), (start_s, _) in itertools.pairwise([(0.0, 0.0), *spans, (clip.duration_s, clip.duration_s)]):
        assert not any(word.start_s < start_s - 0.2 and word.end_s > end_s + 0.2 for word in words)


def test_text_that_is_not_spoken_comes_back_in_order(whisper):
    speech, _ = prompts(1)[0]
    text = "... ?! 日本語 ☃ naïve <|en|>\u00a0<|endoftext|>\n — a\u3000b"
    assert in_order(whisper.align(AudioClip(speech), text), text, 0, len(speech) / SAMPLE_RATE)


# A tiny Whisper with random weights, whose times mean nothing


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory) -> WhisperAligner:
    folder = save_tiny_whisper(tmp_path_factory.mktemp("tiny") / "whisper")
    with pytest.raises(ModelError, match="no_timestamps_token_id"):
        WhisperAligner(folder)
    GenerationConfig(decoder_start_token_id=3, no_timestamps_token_id=5).save_pretrained(folder)
    return WhisperAligner(folder)


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=40), st.integers(0, 20_000), st.booleans())
def test_any_text_comes_back_in_order(tiny_whisper, text, count, is_silent):
    samples = np.zeros(count) if is_silent else np.random.default_rng(count).normal(0, 0.1, count)
    clip = AudioClip(samples.astype(np.float32))
    assert in_order(tiny_whisper.align(clip, text), text, 0, clip.duration_s)


def test_texts_too_long_to_be_spoken_are_spread_and_clips_over_30_s_refused(tiny_whisper):
    clip = AudioClip(np.zeros(29 * SAMPLE_RATE, np.float32))
    long = "word " * 90  # of bytes, 5 each
    assert tiny_whisper.align(clip, long) == spread_words(long.split(), 29.0)
    short = AudioClip(clip.samples[: SAMPLE_RATE // 4])
    assert tiny_whisper.align(short, "one two three four five six") == spread_words(
        ["one", "two", "three", "four", "five", "six"], 0.25
    )
    with pytest.raises(AudioError, match="over Whisper's 30 s"):
        tiny_whisper.align(AudioClip(np.zeros(31 * SAMPLE_RATE, np.float32)), "one")


def test_threads_get_the_words_that_one_alone_gets(tiny_whisper):
    generator = np.random.default_rng(0)
    asked = [
        (AudioClip(generator.normal(0, 0.1, 8000 * count).astype(np.float32)), "so it is " * count)
        for count in (1, 2, 3, 4)
    ]
    expected = [tiny_whisper.align(*one) for one in asked]
    found: dict[int, tuple[Word, ...]] = {}
    threads = [
        threading.Thread(target=lambda place=place: found.update({place: tiny_whisper.align(*asked[place])}))
        for place in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(4)] == expected
