"""torchaudio's forced alignment finds the paths and scores of the Viterbi algorithm that stands in for it."""

from itertools import pairwise

import numpy as np
import pytest

from graft.inference.aligners import ctc

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def torchaudio() -> None:
    """Skip the tests of this file where torchaudio does not load: CPU builds of torch lack the libraries it needs."""
    if ctc.find_alignment() is ctc.viterbi_alignment:
        pytest.skip("could not import 'torchaudio'")


def random_logprobs(frame_count: int, label_count: int, generator: np.random.Generator) -> np.ndarray:
    logits = generator.normal(size=(frame_count, label_count)) * generator.choice([1.0, 3.0, 8.0])
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("seed", range(20))
def test_paths_and_scores_equal_those_of_the_viterbi_algorithm(blank: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logprobs = random_logprobs(int(generator.integers(20, 200)), 5, generator)
    labels = generator.choice([label for label in range(5) if label != blank], size=generator.integers(1, 10)).tolist()
    path, score = ctc.viterbi_alignment(logprobs, labels, blank=blank)
    compiled_path, compiled_score = ctc.torchaudio_alignment(logprobs, labels, blank=blank)
    assert compiled_path.tolist() == path.tolist()
    assert compiled_score == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("labels", [[1, 1], [1, 1, 1, 2, 2], [3, 3, 1, 1]])
def test_a_blank_parts_repeated_labels_in_both(labels: list[int]) -> None:
    repeats = sum(one == other for one, other in pairwise(labels))
    fewest = len(labels) + repeats
    for frame_count in (fewest, fewest + 1, 50):
        logprobs = random_logprobs(frame_count, 4, np.random.default_rng(frame_count))
        path, score = ctc.viterbi_alignment(logprobs, labels, blank=0)
        compiled_path, compiled_score = ctc.torchaudio_alignment(logprobs, labels, blank=0)
        assert compiled_path.tolist() == path.tolist()
        assert compiled_score == pytest.approx(score, rel=1e-5)
    logprobs = random_logprobs(fewest - 1, 4, np.random.default_rng(0))
    assert ctc.viterbi_alignment(logprobs, labels, blank=0)[1] == -np.inf
    with pytest.raises(RuntimeError, match="too long"):
        ctc.torchaudio_alignment(logprobs, labels, blank=0)


@pytest.mark.parametrize("delimiter", [None, 4])
def test_words_have_the_same_frames_with_and_without_torchaudio(
    delimiter: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(1)
    for _ in range(100):
        logprobs = random_logprobs(int(generator.integers(5, 80)), 5, generator)
        words = [
            [ctc.WILDCARD] if generator.random() < 0.2 else generator.integers(1, 4, size=3).tolist() for _ in range(4)
        ]
        with_torchaudio = ctc.word_frames(logprobs, words, blank=0, delimiter=delimiter)
        with monkeypatch.context() as patch:
            patch.setattr(ctc, "find_alignment", lambda: ctc.viterbi_alignment)
            assert ctc.word_frames(logprobs, words, blank=0, delimiter=delimiter) == with_torchaudio
