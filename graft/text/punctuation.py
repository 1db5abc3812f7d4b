"""Give a label without case and punctuation those of a transcript of the same clip.

The words stay the label's. A word takes its case, and the punctuation after it, only where label and transcript agree
on the word.
"""

from dataclasses import dataclass

import regex

from graft.errors import require
from graft.text.characters import SENTENCE_END, WORD, compose, lower_case

_MARKS = regex.compile(r"""["'”’)\]»」』）]*([\p{Terminal_Punctuation}…]+)""")
_OPENING = regex.compile(r"[¿¡]+$")
_JOINERS = frozenset("-./")


@dataclass(frozen=True)
class FormattedText:
    """A label with a transcript's case and punctuation, the number of its words, and of those on which both agree."""

    text: str
    words: int
    agreed: int

    @property
    def agreement(self) -> float:
        return self.agreed / max(1, self.words)


def transfer_formatting(label: str, transcript: str, *, language: str | None = None) -> FormattedText:
    """Write a label with the case and punctuation of an aligned transcript. Raises MissingExtra.

    A word that the transcript has otherwise is in lower case, with a capital where a sentence begins; in English, which
    is the language unless another one is given, "I" is a capital, too. In scripts without spaces each character is a
    word. The label's own punctuation stays, and its words never change: in text style `lower` the result equals the
    label. Quotation marks and brackets are not taken over.
    """
    label, transcript = " ".join(compose(label).split()), compose(transcript)
    words, transcribed = list(WORD.finditer(label)), list(WORD.finditer(transcript))
    partner = _align([_key(word[0]) for word in words], [_key(word[0]) for word in transcribed])
    ends = [*(word.start() for word in words[1:]), len(label)]  # of each word and the gap after it
    transcribed_ends = [*(word.start() for word in transcribed[1:]), len(transcript)]
    written, begins = [label[: words[0].start()] if words else label], True
    for index, (word, end) in enumerate(zip(words, ends, strict=False)):
        gap = label[word.end() : end]
        match = partner.get(index)
        if match is None:
            written.append(_default_case(word[0], begins=begins, is_english=language in (None, "en")))
        else:
            before = transcript[transcribed[match - 1].end() if match else 0 : transcribed[match].start()]
            if (opening := _OPENING.search(before)) and not written[-1].endswith(("¿", "¡")):
                written.append(opening[0])
            # The word takes the transcript's case, and keeps its own apostrophe.
            theirs = transcribed[match][0]
            written.append(theirs.replace("'", "’") if "’" in word[0] else theirs.replace("’", "'"))
            if not gap.strip("' "):
                is_joined, is_last = partner.get(index + 1) == match + 1, match + 1 == len(transcribed)
                after = transcript[transcribed[match].end() : transcribed_ends[match]]
                chosen = _choose_gap(gap, after, is_joined=is_joined, is_last=is_last)
                following = words[index + 1][0] if index + 1 < len(words) else ""
                if lower_case(word[0] + chosen + following) == lower_case(word[0] + gap + following):
                    gap = chosen  # not so where it would join two numbers: 5.20
        written.append(gap)
        begins = SENTENCE_END.search(gap) is not None and gap not in _JOINERS
    return FormattedText("".join(written), len(words), len(partner))


def _align(label: list[str], transcribed: list[str]) -> dict[int, int]:
    """Align two lists of words with the fewest errors (jiwer); returns the indices of equal words in both."""
    partner: dict[int, int] = {}
    if label and transcribed:
        jiwer = require("jiwer", extra="score")
        (chunks,) = jiwer.process_words(" ".join(label), " ".join(transcribed)).alignments
        for chunk in chunks:
            if chunk.type == "equal":
                places = range(chunk.ref_start_idx, chunk.ref_end_idx), range(chunk.hyp_start_idx, chunk.hyp_end_idx)
                partner |= zip(*places, strict=True)
    return partner


def _key(word: str) -> str:
    return word.lower().replace("’", "'")


def _default_case(word: str, *, begins: bool, is_english: bool) -> str:
    """Write a word in lower case, unless it begins a sentence or is the English "I"."""
    plain = word.lower() if word.isupper() else word
    if begins or (is_english and (plain == "i" or plain.startswith(("i'", "i’")))):
        capital = plain[:1].upper()
        # Some ligatures do not return from upper case; they stay as they are.
        return capital + plain[1:] if capital.lower() == plain[:1] else plain
    return plain


def _choose_gap(gap: str, transcribed: str, *, is_joined: bool, is_last: bool) -> str:
    """Choose what follows a word, of the label's gap and the transcript's.

    It is the transcript's hyphen between two words that agree, or the transcript's punctuation before the label's
    space. Between two characters of a script without spaces, the label has no gap.
    """
    if is_joined and gap == " " and transcribed in _JOINERS:
        return transcribed
    marks = _MARKS.match(transcribed) if is_last or not gap or regex.search(r"\s", transcribed) else None
    return (marks[1] if marks else "") + gap
