"""Find the items whose decoding crashes the process, by notes on disk that outlive it.

Some files make a decoder crash, or take more memory than there is. Ray starts another process and gives it the same
batch, without end. So a reader notes the batch that it reads. When a batch has crashed a process, its items are noted
one by one, and an item that crashes its process LONE_CRASHES times more is poisoned: it becomes an error.
"""

import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LONE_CRASHES = 2
"""Crashes of processes while they read an item, after the first one of its batch, that make it poisoned. A killed node
counts as a crash, too."""


class CrashTracker:
    """The note of this process, and the notes that crashed ones left in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._note = folder / uuid.uuid4().hex
        self._crashes: Counter[str] = Counter()
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # the note of a living process, which has just finished
                self._crashes[path.read_text()] += 1

    def has_crashed(self, batch: str) -> bool:
        """Whether a process crashed while it read the batch whose first item has this id."""
        return self._crashes[_batch_note(batch)] > 0

    def is_poisoned(self, item: str) -> bool:
        """Whether an item is not to be read again."""
        return self._crashes[item] >= LONE_CRASHES

    @contextlib.contextmanager
    def note_while_reading(self, batch: str) -> Iterator[None]:
        """Note a batch while the context lasts."""
        self.note_batch(batch)
        try:
            yield
        finally:
            self._note.unlink(missing_ok=True)

    def note_item(self, item: str) -> None:
        """Note one item instead of its batch, while it is read."""
        self._note.write_text(item)

    def note_batch(self, batch: str) -> None:
        """Note the batch instead of an item."""
        self._note.write_text(_batch_note(batch))


def _batch_note(first: str) -> str:
    return f"batch of {first}"
