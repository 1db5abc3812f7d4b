"""Give a label without case and punctuation those of a transcript of the same clip.

The words stay the label's. A word takes its case, and the punctuation after it, only where label and transcript agree
on the word.
"""

import re
from dataclasses import dataclass

from graft.errors import require

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_MARKS = re.compile(r"""["'”’)\]]*([.,;:!?…]+)""")
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


def transfer_formatting(label: str, transcript: str) -> FormattedText:
    """Write a label with the case and punctuation of an aligned transcript. Raises MissingExtra.

    A word that the transcript has otherwise is in lower case, with a capital where a sentence begins. The label's own
    punctuation stays, and its words never change: in text style `lower` the result equals the label. Quotation marks
    and brackets are not taken over.
    """
    label = " ".join(label.split())
    words, transcribed = list(_WORD.finditer(label)), list(_WORD.finditer(transcript))
    partner = _align([_key(word[0]) for word in words], [_key(word[0]) for word in transcribed])
    ends = [*(word.start() for word in words[1:]), len(label)]  # of each word and the gap after it
    transcribed_ends = [*(word.start() for word in transcribed[1:]), len(transcript)]
    written, begins = [label[: words[0].start()] if words else label], True
    for index, (word, end) in enumerate(zip(words, ends, strict=False)):
        gap = label[word.end() : end]
        match = partner.get(index)
        if match is None:
            written.append(_default_case(word[0], begins=begins))
        else:
            # The word takes the transcript's case, and keeps its own apostrophe.
            theirs = transcribed[match][0]
            written.append(theirs.replace("'", "’") if "’" in word[0] else theirs.replace("’", "'"))
            if not gap.strip("' "):
                is_joined, is_last = partner.get(index + 1) == match + 1, match + 1 == len(transcribed)
                after = transcript[transcribed[match].end() : transcribed_ends[match]]
                gap = _choose_gap(gap, after, is_joined=is_joined, is_last=is_last)
        written.append(gap)
        begins = re.search(r"[.!?…]", gap) is not None and gap not in _JOINERS
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


def _default_case(word: str, *, begins: bool) -> str:
    """Write a word in lower case, unless it begins a sentence or is "I"."""
    plain = word.lower() if word.isupper() else word
    if begins or plain == "i" or plain.startswith(("i'", "i’")):
        capital = plain[:1].upper()
        # Some ligatures do not return from upper case; they stay as they are.
        return capital + plain[1:] if capital.lower() == plain[:1] else plain
    return plain


def _choose_gap(gap: str, transcribed: str, *, is_joined: bool, is_last: bool) -> str:
    """Choose what follows a word, of the label's gap and the transcript's.

    It is the transcript's hyphen between two words that agree, or the transcript's punctuation before the label's
    space.
    """
    if is_joined and gap == " " and transcribed in _JOINERS:
        return transcribed
    marks = _MARKS.match(transcribed) if is_last or re.search(r"\s", transcribed) else None
    return (marks[1] if marks else "") + gap
