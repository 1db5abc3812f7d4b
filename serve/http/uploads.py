"""Store uploads in temporary files, where the decoding processes can read them."""

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import UploadFile


@asynccontextmanager
async def save_upload(upload: UploadFile) -> AsyncIterator[str]:
    """Copy an upload to a temporary file, yield its path, and delete it when the block ends."""
    with tempfile.NamedTemporaryFile(prefix="graft-upload-") as file:
        await asyncio.to_thread(shutil.copyfileobj, upload.file, file, 2**20)
        file.flush()
        yield file.name


async def file_digest(path: str) -> str:
    """Return the SHA-256 digest of a file in hexadecimal."""

    def read() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return await asyncio.to_thread(read)
