"""Error rates count what jiwer aligns, after Whisper's normaliser, and their interval is a bootstrap over clips."""

import re
import sys
import unicodedata

import numpy as np
import pytest
import whisper_normalizer.english
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from graft.errors import DataError, MissingExtra, install_command
from graft.text.wer import (
    NORMALIZERS_IN_WORDS,
    WordErrors,
    bootstrap_interval,
    character_errors,
    normalize_english,
    score,
    word_errors,
)

TRICKY = [
    "",
    "...",
    "um, uh... hmm [laughs] (coughs) <noise>",
    "I've won't can't shan't y'all ain't let's she's it'd 'tis",
    "Mr. Jones, Dr. Smith & Mrs. O'Neil's St. James's Esq.",
    "twenty-one thousand three hundred and forty five dollars and ten cents",
    "one oh one, double seven, nineteen eighty four, two and a half",
    "$3.50 €20 £1,000,000 5% three percent fifty per cent minus four",
    "the 1960s, 32nd, twenty-second, sixties, first, zeroth",
    "colour aluminium theatre organise grey",
    "naïve Łódź façade Ærøskøbing straße",
    "don ' t  stop\t\nnow — at 10:30 p.m. v1.2.3 1.5.2",
    "MISTER SMITH'S GOT TWO HUNDRED AND SIX O SIX",
    "½ cup, x², 二〇, ٣",
    "one billion billion. point five. 3 million point 2",
]
NUMBER_PARTS = "and a half point double triple hundred million . % $ £ -3 +4 0.5 '"


def test_the_normaliser_is_whispers():
    spelling = whisper_normalizer.english.EnglishSpellingNormalizer().mapping
    whisper = EnglishTextNormalizer(spelling)
    for text in TRICKY:
        assert normalize_english(text) == whisper(text), text
    # Here whisper-normalizer goes beyond OpenAI's rules.
    assert whisper("kinda sorta dunno cause") == "kinda sorta dunno cause"
    assert normalize_english("kinda sorta dunno cause") == "kind of sort of do not know because"


def test_the_normaliser_takes_whatever_a_model_says():
    random = np.random.default_rng(0)
    words = [
        *" ".join(TRICKY).split(),
        *NUMBER_PARTS.split(),
        "²",
        "\u0301",
        "1/2",
    ]
    for _ in range(2000):
        normalize_english(" ".join(random.choice(words, size=random.integers(1, 8))))


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts"),
    [
        ("", "", (0, 0, 0, 0)),
        ("", "two words", (0, 0, 2, 0)),
        ("two words", "", (0, 2, 0, 0)),
        ("a b c", "a x c d", (1, 0, 1, 2)),
        ("line\nbreak\tand  spaces ", " line break and spaces", (0, 0, 0, 4)),
        ("Case matters.", "case matters", (2, 0, 0, 0)),
    ],
)
def test_words_are_counted(reference, hypothesis, counts):
    assert word_errors(reference, hypothesis) == WordErrors(*counts)


def test_characters_are_counted():
    assert character_errors("ab c", "abc") == WordErrors(0, 1, 0, 3)
    assert character_errors("", "abc") == WordErrors(0, 0, 3, 0)
    assert character_errors("a\n b", "a b").errors == 0


def test_counts_add_up_to_the_corpus_rate():
    total = sum([WordErrors(1, 2, 3, 4), WordErrors(0, 0, 0, 10), WordErrors(insertions=2)], WordErrors())
    assert total == WordErrors(1, 2, 5, 14)
    assert (total.errors, total.reference_count, total.rate) == (8, 17, 8 / 17)
    assert WordErrors().rate == 0.0
    assert WordErrors(insertions=3).rate == 3.0  # It is finite by definition: errors / max(1, words).


def test_the_interval_agrees_with_the_normal_approximation():
    # Each of 1,000 clips of 10 words is all wrong or all right: the rate's standard error is sqrt(p (1 - p) / clips).
    clips, p = 1000, 0.2
    counts = [WordErrors(substitutions=10)] * int(clips * p) + [WordErrors(hits=10)] * int(clips * (1 - p))
    low, high = bootstrap_interval(counts, resamples=4000)
    half = 1.96 * np.sqrt(p * (1 - p) / clips)
    assert low == pytest.approx(p - half, abs=0.1 * half)
    assert high == pytest.approx(p + half, abs=0.1 * half)
    narrow = bootstrap_interval(counts, resamples=4000, level=0.5)
    assert (narrow[1] - narrow[0]) / 2 == pytest.approx(0.6745 / 1.96 * half, rel=0.1)


def test_the_interval_is_seeded_and_weighs_clips_by_their_words():
    counts = [WordErrors(substitutions=index % 7, hits=50 + index) for index in range(60)]
    assert (
        bootstrap_interval(counts, seed=3) == bootstrap_interval(counts, seed=3) != bootstrap_interval(counts, seed=4)
    )
    low, high = bootstrap_interval([WordErrors(substitutions=1, hits=99), WordErrors(substitutions=1)] * 20)
    assert low < 40 / 2020 < high < 0.05  # the mean of the clips' rates would be 0.505
    assert bootstrap_interval([WordErrors(hits=3)]) == (0.0, 0.0)
    assert bootstrap_interval([WordErrors(insertions=1)]) == (1.0, 1.0)
    with pytest.raises(DataError):
        bootstrap_interval([])


def test_many_clips_take_the_same_draws_in_blocks():
    counts = [WordErrors(substitutions=index % 3, hits=5) for index in range(5000)]  # 5 million draws are two blocks.
    low, high = bootstrap_interval(counts)
    assert low < sum(counts, WordErrors()).rate < high
    assert high - low < 0.01


def test_a_score_is_normalised_and_raw():
    result = score(["It's colour number two.", "HELLO", "[noise]"], ["it is color number 2", "hello there", ""])
    assert result.to_dict() == {
        "wer": pytest.approx(1 / 6),
        "wer_low": pytest.approx(result.wer_low),
        "wer_high": pytest.approx(result.wer_high),
        "cer": pytest.approx(6 / 25),
        "wer_raw": pytest.approx(7 / 6),
        "cer_raw": pytest.approx(result.cer_raw),
        "clips": 3,
        "words": 6,
        "normalizer": "english",
    }
    assert 0 <= result.wer_low <= result.wer <= result.wer_high
    assert score(["a b"], ["a b"]).to_dict()["wer_high"] == 0


@pytest.mark.parametrize(
    ("reference", "hypothesis", "language", "normalizer", "errors"),
    [
        ("It costs $5.", "it costs five dollars", None, "english", (0, 3)),
        ("un café", "un cafe", "en", "english", (0, 2)),
        ("Eine Tür (laut).", "eine tur", "de", "basic", (1, 2)),
        ("hello", "hallo", "nl", "basic", (1, 1)),
        ("Été à Paris", "ete à paris", None, "basic", (1, 3)),
        ("यह एक परीक्षण है।", "यह एक परीक्षण हैं", None, "basic", (1, 4)),
        ("안녕하세요 여러분", "안녕하세요, 여러분!", "ko", "basic", (0, 2)),
        ("こんにちは、世界。AI です", "こんばんは 世界 ai です", None, "basic, by character", (2, 10)),
        ("สวัสดีครับ", "สวัสดีครับ", "th", "basic, by character", (0, 7)),
    ],
)
def test_each_language_has_its_normaliser(reference, hypothesis, language, normalizer, errors):
    for form in ("NFC", "NFD"):
        result = score([unicodedata.normalize(form, reference)], [hypothesis], language=language)
        assert (result.normalizer, round(result.wer * result.words), result.words) == (normalizer, *errors)
    if normalizer == "basic, by character":
        assert result.cer == pytest.approx(result.wer, abs=0.02)
    assert normalizer in NORMALIZERS_IN_WORDS


def test_unequal_or_no_clips_are_data_errors():
    for references, hypotheses in [([], []), (["a"], []), (["a"], ["a", "b"])]:
        with pytest.raises(DataError, match=f"{len(references)} references and {len(hypotheses)} hypotheses"):
            score(references, hypotheses)


def test_without_jiwer_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)  # This is Python's own way to hide a package.
    with pytest.raises(MissingExtra, match=re.escape(f"jiwer is not installed: {install_command('score')}")):
        word_errors("a", "a")
