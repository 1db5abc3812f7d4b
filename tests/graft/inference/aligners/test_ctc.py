"""CTC alignment: the likeliest path of all, tones that a tiny model has learned, and words outside its vocabulary."""

import itertools
import sys
import unicodedata

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.errors import ModelError
from graft.inference.aligners.ctc import WILDCARD, CtcAligner, find_alignment, viterbi_alignment, word_frames
from graft.inference.aligners.protocol import spread_words
from graft.text.characters import split_words
from tests.support.spoken_words import VOCABULARY, in_order, save_ctc

TONES = {"a": 400.0, "b": 900.0, "c": 1700.0, "d": 3100.0}
BLANK, DELIMITER = 0, 4


def test_the_path_is_the_likeliest_of_all_that_collapse_to_the_labels():
    generator = np.random.default_rng(3)
    logprobs = torch.from_numpy(generator.normal(size=(6, 4))).log_softmax(-1).numpy().astype(np.float32)
    labels = [[1], [1, 2]]  # 0 is the blank, 3 stands between words
    collapsed = {
        path: [label for label, _ in itertools.groupby(path) if label] for path in itertools.product(range(4), repeat=6)
    }
    paths = [path for path, reading in collapsed.items() if reading == [1, 3, 1, 2]]
    best = max(paths, key=lambda path: sum(logprobs[frame, label] for frame, label in enumerate(path)))
    gap = best.index(3)
    expected = [(best.index(1), gap - best[:gap][::-1].index(1)), (gap + best[gap:].index(1), 6 - best[::-1].index(2))]
    assert word_frames(logprobs, labels, blank=0, delimiter=3) == expected
    assert word_frames(logprobs[:3], labels, blank=0, delimiter=3) == []


def test_a_blank_parts_repeated_letters_and_a_wildcard_takes_the_remaining_frames():
    logprobs = np.log(np.full((9, 3), 0.05))
    for frame, label in enumerate([1, 0, 1, 0, 0, 0, 2, 2, 0]):
        logprobs[frame, label] = np.log(0.9)
    assert word_frames(logprobs, [[1, 1], [2]], blank=0, delimiter=None) == [(0, 3), (6, 8)]
    assert word_frames(logprobs, [[1, 1], [WILDCARD], [2]], blank=0, delimiter=None) == [(0, 3), (3, 6), (6, 8)]
    assert word_frames(logprobs[:2], [[1, 1]], blank=0, delimiter=None) == []


def make_tones(text: str, generator: np.random.Generator) -> tuple[AudioClip, list[tuple[float, float]], np.ndarray]:
    """Make a clip with a tone for each letter and silence between words.

    Returns the clip, the times of its words, and the label of each 20 ms frame. As models do, the labels mark a part of
    the silence with the delimiter and the rest with the blank.
    """
    labels, spans = [DELIMITER] * 5, []
    for word in text.split():
        start = len(labels)
        for letter in word:
            labels += [VOCABULARY[letter.upper()]] * int(generator.integers(5, 12))
        spans.append((start / 50, len(labels) / 50))
        labels += [DELIMITER] * 3 + [BLANK] * int(generator.integers(2, 18))
    hertz = np.array([0.0, *TONES.values()])[np.maximum(np.array(labels) - DELIMITER, 0)]
    phase = 2 * np.pi * np.cumsum(np.repeat(hertz, 320)) / SAMPLE_RATE
    samples = 0.3 * np.sin(phase) + generator.normal(0, 0.003, len(phase))
    return AudioClip(samples.astype(np.float32)), spans, np.array(labels)


@pytest.fixture(scope="module")
def ctc(tmp_path_factory) -> CtcAligner:
    """A wav2vec2 that has learned the label of every frame of such clips, so that its alignment is known."""
    folder = save_ctc(tmp_path_factory.mktemp("ctc") / "tones", VOCABULARY)
    model = Wav2Vec2ForCTC.from_pretrained(folder).train()
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = np.random.default_rng(0)
    for _ in range(80):
        text = " ".join("".join(generator.choice(list("abcd"), size=generator.integers(1, 4))) for _ in range(4))
        clip, _, labels = make_tones(text, generator)
        logits = model(extractor(clip.samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_values"]).logits[
            0
        ]
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[: len(logits)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return CtcAligner(folder)


@pytest.mark.seconds
def test_a_trained_ctc_model_finds_words_where_they_sound(ctc):
    clip, spans, _ = make_tones("ab cda b dcb ca", np.random.default_rng(99))
    words = ctc.align(clip, "ab cda B dcb ca")
    assert in_order(words, "ab cda B dcb ca", 0, clip.duration_s)
    assert np.abs([[word.start_s, word.end_s] for word in words] - np.array(spans)).max() < 0.06


def test_a_word_outside_the_vocabulary_lies_between_its_neighbours(ctc):
    clip, spans, _ = make_tones("ab cda b dcb", np.random.default_rng(5))
    words = ctc.align(clip, "ab 42 b, dçb")
    assert in_order(words, "ab 42 b, dçb", 0, clip.duration_s)
    found = np.array([[word.start_s, word.end_s] for word in words])
    assert np.abs(found[[0, 2, 3]] - np.array(spans)[[0, 2, 3]]).max() < 0.06
    assert spans[0][1] - 0.06 < found[1, 0] < found[1, 1] < spans[2][0] + 0.06


def test_letters_are_spelled_by_their_parts_and_a_text_of_another_script_is_spread(ctc):
    clip, spans, _ = make_tones("ab cda b dcb", np.random.default_rng(5))
    for text in ("Āb çda b dçḃ", unicodedata.normalize("NFD", "Āb çda b dçḃ")):
        words = ctc.align(clip, text)
        assert in_order(words, text, 0, clip.duration_s)
        assert np.abs([[word.start_s, word.end_s] for word in words] - np.array(spans)).max() < 0.06
    for text in ("привет мир", "ab привет", "世界の話"):
        assert ctc.align(clip, text) == spread_words([word for _, word in split_words(text)], clip.duration_s)


def test_characters_without_spaces_follow_each_other_without_a_delimiter(tmp_path):
    kana = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "か": 5, "き": 6, "ᄒ": 7, "ᅡ": 8, "ᆫ": 9}
    aligner = CtcAligner(save_ctc(tmp_path / "kana", kana))
    assert [aligner._labels(word) for word in ("か。", "き", "한", "漢")] == [[5], [6], [7, 8, 9], [WILDCARD]]
    clip = AudioClip(np.random.default_rng(1).normal(0, 0.1, SAMPLE_RATE).astype(np.float32))
    assert [word.text for word in aligner.align(clip, "かき。 か")] == ["か", "き。", "か"]
    logprobs = np.log(np.full((7, 4), 0.05))
    for frame, label in enumerate([0, 1, 1, 2, 3, 1, 0]):
        logprobs[frame, label] = np.log(0.85)
    spans = word_frames(logprobs, [[1], [2], [1]], blank=0, delimiter=3, joined={1})
    assert spans == [(1, 3), (3, 4), (5, 6)]


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 1.0), ("7 — 8", 1.0), ("ab " * 40, 0.5), ("ab", 0.01), ("ab", 0.0), ("abba aa bb", 2.0)]
)
def test_ctc_keeps_the_words_of_any_text_in_order(ctc, text, seconds):
    clip = AudioClip(np.random.default_rng(1).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32))
    assert in_order(ctc.align(clip, text), text, 0, clip.duration_s)


def test_a_vocabulary_without_letters_is_refused(tmp_path):
    folder = save_ctc(tmp_path / "pieces", {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "the": 5, "ing": 6})
    with pytest.raises(ModelError, match="no letters"):
        CtcAligner(folder)


def test_without_a_torchaudio_that_loads_paths_are_found_by_viterbi(tmp_path, monkeypatch):
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('Could not load this library')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    find_alignment.cache_clear()
    assert find_alignment() is viterbi_alignment
    find_alignment.cache_clear()
