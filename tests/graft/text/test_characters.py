"""Letters keep their marks in every script, and words, symbols and lengths are those that people speak."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.text.characters import (
    WORD,
    compose,
    compression_ratio,
    count_words,
    display_columns,
    is_unspaced,
    lower_case,
    split_words,
)
from graft.text.prompts import check_context_words, is_formatted, style_text

SENTENCES = {
    "vi": "Tiếng Việt rất hay, phải không?",
    "hi": "यह एक परीक्षण है। क्या आप ठीक हैं?",
    "ru": "Привет, мир! Ёлка всё ещё зелёная.",
    "ja": "こんにちは、世界。コーヒーをください!",
    "th": "สวัสดีครับ วันนี้อากาศดี",
    "ar": "مَرحبًا، كيف الحال؟",
    "fa": "می‌خواهم بروم.",
    "he": "צה״ל ניצח, שלום!",
    "ca": "La col·lecció és aquí.",
    "el": "Ο ΣΑΣ ΠΟΥ ΕΙΝΑΙ;",
    "hy": "Ինչո՞ւ չէ։",
    "ta": "வணக்கம், எப்படி இருக்கிறீர்கள்?",
}
LOWER = {
    "vi": "tiếng việt rất hay phải không",
    "hi": "यह एक परीक्षण है क्या आप ठीक हैं",
    "ru": "привет мир ёлка всё ещё зелёная",
    "ja": "こんにちは世界コーヒーをください",
    "th": "สวัสดีครับ วันนี้อากาศดี",
    "ar": "مَرحبًا كيف الحال",
    "fa": "می‌خواهم بروم",
    "he": "צה״ל ניצח שלום",
    "ca": "la col·lecció és aquí",
    "el": "ο σας που ειναι",
    "hy": "ինչու չէ",
    "ta": "வணக்கம் எப்படி இருக்கிறீர்கள்",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_lower_case_keeps_the_letters_and_marks_of_a_script(language):
    text = SENTENCES[language]
    for form in ("NFC", "NFD"):
        assert style_text(unicodedata.normalize(form, text), "lower") == LOWER[language]
        assert style_text(unicodedata.normalize(form, text), "raw") == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("E\u0301te\u0301", "été"),
        ("İstanbul", "i̇stanbul"),
        ("AT&T costs $5.20, 50%", "at&t costs $5.20 50%"),
        ("C++ at -5 °C, not 3-4 or +7.", "c++ at -5 °c not 3 4 or +7"),
        ("10:30, 24/7, 1,000 and .5 for -$3.", "10:30 24/7 1,000 and .5 for -$3"),
        ("The boys' ’tis 'quoted' don’t a_b e-mail... x", "the boys tis quoted don't a b e mail x"),
        ("me@home.org #1 §5 (loud) ♪ 😀", "me@home org #1 §5 loud"),
        ("I ❤️ you 👩‍👩‍👧 1️⃣ 🇫🇷, ok 👍🏽", "i you 1 ok"),
        ("soft\u00adhyphen \ufeffmark nul\x00byte", "softhyphen mark nul byte"),
    ],
)
def test_symbols_that_are_read_aloud_stay(text, expected):
    assert lower_case(text) == expected


@given(st.text(max_size=30))
def test_lower_case_twice_is_lower_case_once(text):
    once = lower_case(text)
    assert lower_case(once) == once == compose(once)
    assert lower_case(unicodedata.normalize("NFD", text)) == once


def test_words_of_scripts_without_spaces_are_characters():
    assert WORD.findall("Hello, 世界コーヒー don’t यह है") == ["Hello", "世", "界", "コー", "ヒー", "don’t", "यह", "है"]
    assert WORD.findall("❤️ 👩‍👩‍👧 नहीं") == ["नहीं"]
    assert count_words(WORD.findall("one two 世界世")) == 3
    assert [is_unspaced(SENTENCES[language]) for language in ("ja", "th", "ru", "hi")] == [True, True, False, False]
    assert is_unspaced("AI 技術の話")
    assert not any(map(is_unspaced, ["He said 你好 to me", ""]))


def test_words_have_times_of_their_own_where_they_are_characters():
    text = "「吾輩は猫」。 AI 技術, don't สวัสดีครับ 한국어"
    words = split_words(text)
    assert [word for _, word in words][:8] == ["「吾", "輩", "は", "猫」。", "AI", "技", "術,", "don't"]
    assert [word for _, word in words][8:] == [*("ส", "วั", "ส", "ดี", "ค", "รั", "บ"), "한국어"]
    assert "".join(map("".join, words)).strip() == text
    assert split_words("") == split_words(" \n") == []


def test_lengths_are_those_of_speech():
    assert [display_columns(text) for text in ("abc", "été", "e\u0301", "世界", "है")] == [3, 3, 1, 4, 1]
    hindi = "मैं आज बाज़ार गया था और वहाँ से बहुत सारी सब्ज़ियाँ लाया क्योंकि घर में मेहमान आने वाले हैं"
    assert compression_ratio(hindi) < 1.5 < 2.4 < compression_ratio(hindi[:12] * 8)
    assert compression_ratio("") == 0.0 < compression_ratio("".join(map(chr, range(0x4E00, 0x5000)))) < 1


def test_sentences_of_scripts_without_case_are_formatted_by_their_punctuation():
    assert all(is_formatted(SENTENCES[language]) for language in SENTENCES if language not in ("th", "el"))
    assert not any(is_formatted(LOWER[language]) for language in LOWER)
    assert not any(map(is_formatted, ["AIの話", "it costs 5.20", "ПРИВЕТ, МИР!", "10:30"]))


def test_context_words_are_composed():
    assert check_context_words(["E\u0301te\u0301", "Été", "東京、"]) == ["Été", "東京"]
