"""A digest is remembered for a file that has not changed, and for no other."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from graft.storage import user_cache
from graft.storage.user_cache import cache_path, file_digest


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose last change counts as long ago."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    monkeypatch.setattr(user_cache, "SETTLED_S", -3600.0)
    return path


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def records(cache: Path) -> list[Path]:
    return sorted((cache / "digests").glob("*"))


def test_a_file_is_read_once(weights: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert file_digest(weights, cache) == digest_of(b"weights")
    (record,) = records(cache)
    known = json.loads(record.read_text())
    assert (known["path"], known["sha256"]) == (str(weights), digest_of(b"weights"))
    record.write_text(json.dumps(known | {"sha256": "as remembered"}))
    (tmp_path / "link").symlink_to(weights)
    assert file_digest(weights, cache) == file_digest(tmp_path / "link", cache) == "as remembered"
    assert records(cache) == [record]


def test_a_changed_file_is_never_trusted(weights: Path, tmp_path: Path) -> None:
    cache, before = tmp_path / "cache", weights.stat()
    file_digest(weights, cache)
    weights.write_bytes(b"changed")  # as long as before, and said to be as old
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(weights, cache) == digest_of(b"changed")
    (tmp_path / "other").write_bytes(b"another")
    os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "other").replace(weights)
    assert file_digest(weights, cache) == digest_of(b"another")
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "missing", cache)


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    assert file_digest(tmp_path / "weights", tmp_path / "cache") == digest_of(b"weights")
    assert not records(tmp_path / "cache")


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"state": 1}'])
def test_a_broken_record_is_written_again(content: str, weights: Path, tmp_path: Path) -> None:
    file_digest(weights, tmp_path)
    (record,) = records(tmp_path)
    whole = record.read_text()
    record.write_text(content)
    assert file_digest(weights, tmp_path) == digest_of(b"weights")
    assert record.read_text() == whole


def test_a_cache_that_cannot_be_written_does_not_matter(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert file_digest(weights, tmp_path / "file") == digest_of(b"weights")


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    assert cache_path("digests", "a") == tmp_path / "digests" / "a"
    monkeypatch.setenv("GRAFT_CACHE", "")
    assert cache_path("digests", "a") == Path.home() / ".cache" / "graft" / "digests" / "a"
