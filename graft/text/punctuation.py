"""Case and punctuation for a label that has none, from a transcript of the same clip.

The words stay the label's. A word takes its case, and the punctuation after it, only where label and transcript agree on the word.
"""

import re
from dataclasses import dataclass

from graft.errors import require

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_MARKS = re.compile(r"""["'”’)\]]*([.,;:!?…]+)""")
_JOINERS = frozenset("-./")


@dataclass(frozen=True)
class Formatted:
    """A label with the case and punctuation of a transcript, how many words it has, and on how many of them both agree."""

    text: str
    words: int
    agreed: int

    @property
    def agreement(self) -> float:
        return self.agreed / max(1, self.words)


def transfer_formatting(label: str, transcript: str) -> Formatted:
    """Write a label as an aligned transcript is written. Raises MissingExtra.

    A word that was heard otherwise is in lower case, with a capital where a sentence begins. Punctuation of the label's own stays, and the
    words never change: in text style `lower` the result equals the label. Quotation marks and brackets are not taken over.
    """
    label = " ".join(label.split())
    words, heard = list(_WORD.finditer(label)), list(_WORD.finditer(transcript))
    partner = _aligned([_key(word[0]) for word in words], [_key(word[0]) for word in heard])
    written, begins = [label[: words[0].start()] if words else label], True
    for index, word in enumerate(words):
        end = words[index + 1].start() if index + 1 < len(words) else len(label)
        gap = label[word.end() : end]
        match = partner.get(index)
        written.append(_same_word(heard[match][0], word[0]) if match is not None else _unheard(word[0], begins=begins))
        if match is not None and not gap.strip("' "):
            end = heard[match + 1].start() if match + 1 < len(heard) else len(transcript)
            is_joined = partner.get(index + 1) == match + 1
            gap = _heard_gap(
                gap, transcript[heard[match].end() : end], is_joined=is_joined, is_last=match + 1 == len(heard)
            )
        written.append(gap)
        begins = re.search(r"[.!?…]", gap) is not None and gap not in _JOINERS
    return Formatted("".join(written), len(words), len(partner))


def _aligned(label: list[str], heard: list[str]) -> dict[int, int]:
    """Place of a word in the label -> its place in the transcript, for the words that agree in an alignment of fewest errors (jiwer)."""
    if not label or not heard:
        return {}
    jiwer = require("jiwer", extra="score")
    (chunks,) = jiwer.process_words(" ".join(label), " ".join(heard)).alignments
    return {
        chunk.ref_start_idx + offset: chunk.hyp_start_idx + offset
        for chunk in chunks
        if chunk.type == "equal"
        for offset in range(chunk.ref_end_idx - chunk.ref_start_idx)
    }


def _key(word: str) -> str:
    return word.lower().replace("’", "'")


def _same_word(heard: str, word: str) -> str:
    """The word in the case in which it was heard, with the label's own apostrophe."""
    return heard.replace("’", "'") if "’" not in word else heard.replace("'", "’")


def _unheard(word: str, *, begins: bool) -> str:
    plain = word.lower() if word.isupper() else word
    if begins or plain == "i" or plain.startswith(("i'", "i’")):
        capital = plain[:1].upper()
        return capital + plain[1:] if capital.lower() == plain[:1] else plain  # not so for some ligatures
    return plain


def _heard_gap(own: str, heard: str, *, is_joined: bool, is_last: bool) -> str:
    """What follows a word: the heard hyphen between two words that agree, or heard punctuation before the label's own space."""
    if is_joined and own == " " and heard in _JOINERS:
        return heard
    marks = _MARKS.match(heard) if is_last or re.search(r"\s", heard) else None
    return (marks[1] if marks else "") + own
