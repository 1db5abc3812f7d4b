"""Uploads on disk, where decoders find them, for as long as they are needed."""

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import UploadFile


@asynccontextmanager
async def saved(upload: UploadFile) -> AsyncIterator[str]:
    """The path of a copy."""
    with tempfile.NamedTemporaryFile(prefix="graft-upload-") as file:
        await asyncio.to_thread(shutil.copyfileobj, upload.file, file, 2**20)
        file.flush()
        yield file.name


async def digest(path: str) -> str:
    """What tells a file from others."""

    def read() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return await asyncio.to_thread(read)
