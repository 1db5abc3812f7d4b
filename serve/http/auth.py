"""Read API keys, keep their digests, and compare them in constant time."""

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from graft.errors import RecipeError

KEYS_VARIABLE = "GRAFT_API_KEYS"


class ApiKeys:
    """A set of API keys, kept as SHA-256 digests. An empty set means that requests are not authenticated."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def from_environment(cls, file: str | None = None) -> "ApiKeys":
        """Read the keys in GRAFT_API_KEYS, separated by commas, and those in a file, one a line. Raises RecipeError."""
        keys = os.environ.get(KEYS_VARIABLE, "").split(",")
        if file is not None:
            try:
                keys += Path(file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"key_file {file} cannot be read: give a text file with one key a line") from error
        return cls(key.strip() for key in keys if key.strip())

    def __or__(self, other: "ApiKeys") -> "ApiKeys":
        union = ApiKeys()
        union._digests = [*self._digests, *other._digests]
        return union

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, key: str) -> bool:
        digest = _digest(key)
        # A list, so that every key is compared and the time does not tell which one matched.
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
