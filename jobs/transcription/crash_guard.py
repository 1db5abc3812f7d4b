"""Items that end the process which reads them: told from those that only were there by notes that outlive it.

Some files make a decoder crash, or take more memory than there is. Ray starts another process and gives it the same batch, for ever. So
a reader notes the batch that it reads; where a batch has ended a process, its items are noted one by one, and one that does it again and
again becomes an error.
"""

import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

DEATHS = 2
"""Of processes that read an item when its batch had ended one already: then it is not read again. A killed node is one, too."""


class CrashTracker:
    """The notes of one process, and what others left behind in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._note = folder / uuid.uuid4().hex
        self._left: Counter[str] = Counter()
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a living process's, which is through
                self._left[path.read_text()] += 1

    def has_ended_a_process(self, batch: str) -> bool:
        """Whether a process died while it read a batch, by the id of its first item."""
        return self._left[_of_batch(batch)] > 0

    def is_poisoned(self, item: str) -> bool:
        """Whether an item is not to be read again."""
        return self._left[item] >= DEATHS

    @contextlib.contextmanager
    def noted(self, batch: str) -> Iterator[None]:
        """Note a batch while the context lasts."""
        self.note_batch(batch)
        try:
            yield
        finally:
            self._note.unlink(missing_ok=True)

    def note_item(self, item: str) -> None:
        """Note an item of the noted batch in its place, while it is read."""
        self._note.write_text(item)

    def note_batch(self, batch: str) -> None:
        """Note the batch again."""
        self._note.write_text(_of_batch(batch))


def _of_batch(first: str) -> str:
    return f"batch of {first}"
