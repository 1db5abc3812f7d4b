"""Decide which words of a text that is still being spoken will stay: those on which two passes in a row agree.

The rule is local agreement (Liu et al. 2020, "Low-latency sequence-to-sequence speech recognition"; Macháček et al.
2023, "Turning Whisper into real-time transcription system"): the longest common prefix of two passes' words.
"""

from graft.text.characters import split_words

HELD_BACK = 1
"""Words at the end of a pass that are not agreed on while somebody speaks: the audio may end within one."""


class Agreement:
    """Keeps the words of an utterance that passes agree on; each pass must begin with them."""

    def __init__(self) -> None:
        self.text = ""
        """The words that were agreed on. They stay."""
        self._last: list[tuple[str, str]] = []

    def add(self, text: str, *, is_spoken: bool) -> str:
        """Compare a pass with the one before; returns the text that is new in `text`.

        `is_spoken` says that the audio of the pass ends within speech.
        """
        words = split_words(text)
        most = len(words) - HELD_BACK if is_spoken else len(words)
        count = 0
        for word, before in zip(words[: max(most, 0)], self._last, strict=False):
            if word != before:
                break
            count += 1
        self._last = words
        agreed = "".join(gap + word for gap, word in words[:count]).strip()
        if not agreed.startswith(self.text):
            return ""
        new, self.text = agreed[len(self.text) :], agreed
        return new

    def finish(self, text: str) -> str:
        """Take the last pass; returns the text that is new in it.

        Words that were agreed on stay, even where the pass does not begin with them, and take the place of as many.
        """
        text = " ".join(text.split())
        if not text.startswith(self.text):
            rest = split_words(text)[len(split_words(self.text)) :]
            text = self.text + "".join(gap + word for gap, word in rest)
        new, self.text = text[len(self.text) :], text
        return new
