"""Hold what is known of an utterance: its stretches of audio, and the text that was sent."""

from dataclasses import dataclass, field

import numpy as np

from .agreement import Agreement
from .events import Event, completed, failed, text_delta


@dataclass(eq=False)
class Utterance:
    """What is spoken between two pauses or, without detection of turns, between two commits: an item of the API.

    Positions are in samples. `end` is None until it is committed, `language` until it is known.
    """

    id: str
    start: int
    end: int | None = None
    pieces: "list[Piece]" = field(default_factory=list)
    text: str = ""
    """Text that was sent in deltas."""
    language: str | None = None
    error: Event | None = None
    """Why it cannot be transcribed."""
    committed_at: float = 0.0
    """Time of the commit, in seconds of time.monotonic."""
    work_s: float = 0.0
    """Seconds that passes over it took."""

    @property
    def is_done(self) -> bool:
        """Whether it is committed and nothing is left to transcribe."""
        return self.end is not None and (self.error is not None or all(piece.is_done for piece in self.pieces))

    def add_text(self, piece: "Piece", new: str) -> Event | None:
        """Return the event that sends new text of a piece; None for none."""
        if not new:
            return None
        if not piece.has_text and self.text:
            new = f" {new}"  # between two pieces
        piece.has_text = True
        self.text += new
        return text_delta(self.id, new)

    def last_event(self, seconds: float) -> Event:
        """Return the event that ends it; `seconds` is the duration of its audio."""
        return failed(self.id, self.error) if self.error else completed(self.id, self.text, seconds)


@dataclass(eq=False)
class Piece:
    """A stretch of an utterance that the model takes at once. `end` is None while it is spoken."""

    utterance: Utterance
    start: int
    end: int | None = None
    speech_end: int = 0
    """End of the last sound, once the piece has ended."""
    samples: np.ndarray | None = None
    """All samples, once the piece has ended."""
    agreement: Agreement = field(default_factory=Agreement)
    pass_end: int = 0
    """Position to which the last pass that has ended read."""
    pass_text: str | None = None
    """Text of that pass, if it had one."""
    has_text: bool = False
    is_done: bool = False
