"""Metadata that was read once, kept in a folder: of a corpus of thousands of files on the hub, reading it again takes many minutes."""

import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from pyarrow import feather

from graft.columns import Metadata

_GROUP_SIZES = b"group_sizes"


def kept(folder: Path, key: str, read: Callable[[], Metadata]) -> Metadata:
    """What `read` returned when it was last asked under this key; a file that is not whole counts as none."""
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.arrow"
    try:
        table = feather.read_table(path, memory_map=False)
        sizes = json.loads(table.schema.metadata[_GROUP_SIZES])
        return Metadata(table["ids"], table["texts"], table["duration_s"].to_numpy(), sizes)
    except (OSError, pa.ArrowInvalid):
        metadata = read()
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"ids": metadata.ids, "texts": metadata.texts, "duration_s": pa.array(metadata.duration_s)}
    table = pa.table(columns).replace_schema_metadata({_GROUP_SIZES: json.dumps(metadata.group_sizes)})
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        feather.write_feather(table, temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return metadata
