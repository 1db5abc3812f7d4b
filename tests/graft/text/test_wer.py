"""Error rates count what jiwer and kaldialign align, after Whisper's normaliser, and have bootstrap intervals."""

import re
import sys
import unicodedata

import jiwer
import kaldialign
import numpy as np
import pytest
import whisper_normalizer.english
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from graft.errors import DataError, MissingExtra, install_command
from graft.text.wer import (
    ENGLISH,
    NORMALIZERS_IN_WORDS,
    OPENAI_ENGLISH,
    RATES,
    WordErrors,
    character_errors,
    compound_word_errors,
    count_clips,
    errors_of,
    normalize,
    package_versions,
    references_of,
    score,
    total,
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
        assert normalize(text, ENGLISH) == whisper(text), text
    # Here whisper-normalizer goes beyond OpenAI's rules, unless those are asked for.
    said = "kinda sorta dunno cause"
    assert whisper(said) == normalize(said, OPENAI_ENGLISH) == said
    assert normalize(said, ENGLISH) == "kind of sort of do not know because"


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
        normalize(" ".join(random.choice(words, size=random.integers(1, 8))), ENGLISH)


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


def test_compounds_may_be_joined_or_parted():
    for reference, hypothesis, counts in [
        ("the white paper is out", "the whitepaper is out", (0, 0, 0, 5)),
        ("the whitepaper is out", "the white paper is out", (0, 0, 0, 4)),
        ("white paper", "whitepapers", (1, 1, 0, 0)),
        ("a b", "", (0, 2, 0, 0)),
        ("", "a b", (0, 0, 2, 0)),
    ]:
        assert compound_word_errors(reference, hypothesis) == WordErrors(*counts), reference
    assert word_errors("the white paper is out", "the whitepaper is out").errors == 2


def test_clips_are_counted_as_jiwer_and_kaldialign_count_them():
    random = np.random.default_rng(0)
    words = ["a", "b", "c", "d", "white", "paper", "whitepaper", "Über", "5", ","]
    texts = [[" ".join(random.choice(words, size=random.integers(0, 12))) for _ in range(200)] for _ in range(2)]
    plain = count_clips(*texts, str)
    merged = count_clips(*texts, str, merges_compounds=True)
    assert plain.keys() == merged.keys() == set(RATES)
    for place, (reference, hypothesis) in enumerate(zip(*texts, strict=True)):
        aligned = jiwer.process_words(reference, hypothesis)
        counts = aligned.substitutions, aligned.deletions, aligned.insertions, aligned.hits
        assert tuple(plain["wer"][place]) == tuple(plain["wer_raw"][place]) == counts
        folded = jiwer.process_words(reference.casefold(), hypothesis.casefold())
        assert errors_of(plain["wer_folded"])[place] == folded.substitutions + folded.deletions + folded.insertions
        letters = jiwer.process_characters(reference, hypothesis)
        assert tuple(plain["cer"][place][:3]) == (letters.substitutions, letters.deletions, letters.insertions)
        assert sum(counts[:3]) == kaldialign.edit_distance(reference.split(), hypothesis.split())["total"]
        joined = kaldialign.edit_distance(reference.split(), hypothesis.split(), merge_compounds=True)
        assert errors_of(merged["wer"])[place] == joined["total"] <= sum(counts[:3])
        assert references_of(merged["wer"])[place] == references_of(plain["wer"])[place] == len(reference.split())
    parts = [count_clips(texts[0][part], texts[1][part], str) for part in (slice(0, 70), slice(70, None))]
    for rate in RATES:  # counts add up over shards
        assert sum((total(part[rate]) for part in parts), WordErrors()) == total(plain[rate])
    batch = kaldialign.batch_error_rate(
        [text.split() for text in texts[0]], [text.split() for text in texts[1]], merge_compounds=True
    )
    assert total(merged["wer"]).rate == pytest.approx(batch["err_rate"])


def test_the_packages_that_decide_a_rate_are_named():
    versions = package_versions()
    assert versions["whisper-normalizer"].startswith("0.1.")
    assert versions.keys() >= {"jiwer", "kaldialign"}
    assert package_versions(["no-such-package"]) == {}


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
