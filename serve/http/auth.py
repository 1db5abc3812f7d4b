"""API keys: who may ask. Kept as digests, compared in constant time."""

import hashlib
import hmac
import os
from pathlib import Path

from graft.errors import RecipeError

VARIABLE = "GRAFT_API_KEYS"


class Keys:
    """Known keys; without any, everyone may ask."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def from_environment(cls, file: str | None = None) -> "Keys":
        """Read keys from the environment variable GRAFT_API_KEYS, between commas, and from a file, one a line. Raises RecipeError."""
        keys = os.environ.get(VARIABLE, "").split(",")
        if file is not None:
            try:
                keys += Path(file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"key_file {file} can't be read: give a text file with a key in each line") from error
        return cls([key.strip() for key in keys if key.strip()])

    def __or__(self, other: "Keys") -> "Keys":
        """The keys that either knows."""
        both = Keys([])
        both._digests = [*self._digests, *other._digests]
        return both

    def __bool__(self) -> bool:
        return bool(self._digests)

    def know(self, key: str) -> bool:
        """Whether a key is among them; takes as long for any."""
        given = _digest(key)
        return any([hmac.compare_digest(given, digest) for digest in self._digests])  # all of them, not up to the first


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
