"""Name languages by their codes (ISO 639-1), as Whisper does."""

import re

from graft.errors import DataError

_CODE = re.compile(r"([a-z]{2,3})(?:[-_][\w-]*)?")
_WHISPERS_CODES = {"cmn": "zh", "fil": "tl", "iw": "he", "jv": "jw", "nb": "no"}


def language_code(language: str) -> str:
    """Return the code of a language that is given by its code, with or without a region, or by its English name.

    Raises DataError for any other text.
    """
    given = language.strip().lower()
    if found := _CODE.fullmatch(given):
        return _WHISPERS_CODES.get(found[1], found[1])
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    if given not in TO_LANGUAGE_CODE:
        raise DataError(f"language {language!r:.80} is none that is known: give its code by ISO 639-1, such as de")
    return TO_LANGUAGE_CODE[given]


def language_name(code: str) -> str:
    """Return the English name of a language, or its code where Whisper does not know it."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return LANGUAGES[code].title() if code in LANGUAGES else code
