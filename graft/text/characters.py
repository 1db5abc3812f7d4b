"""Tell letters, words, punctuation and symbols apart in every script.

The patterns are of the package regex, which knows Unicode's properties; Python's own class of letters holds no
combining marks.
"""

import unicodedata
import zlib
from collections.abc import Sequence
from unicodedata import east_asian_width

import regex

UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
"""A character of a script that puts no spaces between words."""
UNSPACED_CHARACTERS_PER_WORD = 3.0
"""Characters of such a script that make a word: about 1.5 in Chinese, 2.5 in Japanese and 3 in Thai."""
# They shape letters in Persian and Indic words, and are not seen themselves. Emoji hold them, too.
JOINERS = r"\u200c\u200d"
_SPACED = rf"[[\p{{L}}\p{{M}}\p{{N}}{JOINERS}]--{UNSPACED}]"
WORD = regex.compile(
    rf"(?V1){UNSPACED}[\p{{M}}\p{{Lm}}]*"
    rf"|(?=[\p{{L}}\p{{N}}]){_SPACED}+(?:['’]{_SPACED}+)*"
)
"""A word with its apostrophes; in scripts without spaces each character is one."""
_SENTENCE_MARK = r"[\p{Terminal_Punctuation}…¿¡]"
SENTENCE_MARK = regex.compile(rf"(?<!\p{{N}}){_SENTENCE_MARK}|{_SENTENCE_MARK}(?!\p{{N}})")
"""Punctuation of sentences, but not the points and commas within numbers."""
SENTENCE_END = regex.compile(r"[\p{Sentence_Terminal}…]")

_CLUSTER = regex.compile(r"\X")
_OPENING = r"[\p{Ps}\p{Pi}]"
# A character of a script without spaces, with the punctuation around it; or all up to the next one.
_PIECE = regex.compile(
    rf"{_OPENING}*(?={UNSPACED})\X[\p{{Po}}\p{{Pe}}\p{{Pf}}\p{{Lm}}]*|(?:(?!{_OPENING}*{UNSPACED})\X)+|\X"
)
_LETTER = rf"[\p{{L}}\p{{M}}\p{{N}}{JOINERS}]"
# What a text in lower case keeps: words, with the signs inside words and numbers, and symbols that are read aloud.
_KEPT = (
    rf"[\p{{L}}\p{{N}}]{_LETTER}*"
    rf"|(?<={_LETTER})'(?={_LETTER})"
    r"|(?<=[\p{L}\p{M}])[·‧״་](?=[\p{L}\p{M}])|(?<=\p{Hebrew})׳"  # Catalan, Hebrew, Tibetan
    r"|(?<=\p{N})[.,:/٫٬](?=\p{N})"
    r"|(?<![^\s\p{Sc}+−-])[.](?=\p{N})"  # .5
    r"|(?<!\S)[+−-](?=\p{Sc}?\.?\p{N})"  # a number's sign
    r"|[\p{Sc}%‰&@#§№°℃℉+=×÷±％＆＠＃＋＝]"
)
_GONE = "\x00"
_DROPPED = regex.compile(rf"(?:{_KEPT})(*SKIP)(*FAIL)|[^\s]")
# Enclosing marks and variation selectors choose the look of emoji and letters; Armenian puts its marks inside a word.
_INVISIBLE = regex.compile(
    rf"(?V1)[\p{{Cf}}--[{JOINERS}]]|[\u20dd-\u20e0\u20e2-\u20e4\ufe00-\ufe0f\U000e0100-\U000e01ef]|[՛՜՞]"
)
_BETWEEN_UNSPACED = regex.compile(rf"(?<={UNSPACED}[\p{{M}}\p{{Lm}}]*){_GONE}+(?={UNSPACED})")


def compose(text: str) -> str:
    """Write a text in Unicode's composed form NFC, in which equal texts have equal characters."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def lower_case(text: str) -> str:
    """Write a text in lower case without punctuation, by words with single spaces between them.

    Letters keep their marks, and stay in NFC. Symbols that are read aloud stay: currencies, % ‰ & @ # § № ° + = × ÷ ±.
    So do the signs within numbers (5.20, 10:30, 1/2, -3) and within words (it's, col·lecció). Any other character ends
    a word, except between two characters of a script without spaces, where it leaves no trace.
    """
    text = _INVISIBLE.sub("", compose(compose(text).lower()).replace("’", "'").replace(_GONE, " "))
    text = _BETWEEN_UNSPACED.sub("", _DROPPED.sub(_GONE, text))
    return " ".join(text.replace(_GONE, " ").split())


def split_words(text: str) -> list[tuple[str, str]]:
    """Split a text into words with the punctuation around them, and what stands before each: a space, or nothing.

    In scripts without spaces each character is one, with its marks, as in error rates.
    """
    words = []
    for spaced in text.split():
        gap = " "
        for word in [spaced] if spaced.isascii() else _PIECE.findall(spaced):
            words.append((gap, word))
            gap = ""
    return words


def count_words(words: Sequence[str]) -> float:
    """Count the words that WORD finds; characters of scripts without spaces make one word in threes."""
    unspaced = sum(_UNSPACED_START.match(word) is not None for word in words)
    return len(words) - unspaced + unspaced / UNSPACED_CHARACTERS_PER_WORD


def display_columns(text: str) -> int:
    """Return the width of a text in characters, of which the wide ones of East Asia count twice and marks not."""
    if text.isascii():
        return len(text)
    return sum(1 + any(east_asian_width(sign) in "WF" for sign in cluster) for cluster in _CLUSTER.findall(text))


def is_unspaced(text: str) -> bool:
    """Tell whether most letters of a text are of scripts without spaces."""
    unspaced = sum(1 for _ in _UNSPACED_START.finditer(text))
    return 2 * unspaced > sum(1 for _ in _ANY_LETTER.finditer(text))


def compression_ratio(text: str) -> float:
    """Return how many times as small zlib makes a text: a text that repeats itself has a large ratio.

    Each character counts as one byte. UTF-8 writes most scripts with two or three bytes for each letter, which zlib
    would find to be alike.
    """
    if text.isascii():
        data = text.encode()
    else:
        codes = {character: code for code, character in enumerate(sorted(set(text)))}
        size = 1 if len(codes) <= 256 else 2
        data = b"".join(codes[character].to_bytes(size) for character in text)
    return len(text) / len(zlib.compress(data)) if text else 0.0


_UNSPACED_START = regex.compile(UNSPACED)
_ANY_LETTER = regex.compile(r"\p{L}")
