"""What is kept of a URI names the place and no secret."""

import pytest

from graft.redaction import without_secrets


@pytest.mark.parametrize(
    ("uri", "kept"),
    [
        ("s3://KEY:SECRET@bucket/a%20b/*.flac?endpoint_override=host:9000", "s3://bucket/a%20b/*.flac?endpoint_override=host:9000"),
        ("s3://bucket/x?scheme=http&secret_key=abc&access_key=K", "s3://bucket/x?scheme=http"),
        ("https://me:pw@host:8/a.jsonl?id=3&X-Amz-Signature=f&sig=g&Policy=h", "https://host:8/a.jsonl?id=3"),
        ("https://host/a?token=f", "https://host/a"),
        ("hf://datasets/owner/name@main/part.parquet", "hf://datasets/owner/name@main/part.parquet"),
        ("/data/me@home/a?b.wav", "/data/me@home/a?b.wav"),
        ("small", "small"),
        ({"files": ["s3://k:s@b/x", 3, None]}, {"files": ["s3://b/x", 3, None]}),
    ],
)  # fmt: skip
def test_secrets_are_removed(uri: object, kept: object) -> None:
    assert without_secrets(uri) == kept
