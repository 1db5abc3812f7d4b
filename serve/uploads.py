"""Uploads on disk, where decoders find them, for as long as they are needed."""

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import UploadFile


@asynccontextmanager
async def saved(upload: UploadFile) -> AsyncIterator[str]:
    """The path of a copy."""
    with tempfile.NamedTemporaryFile(prefix="graft-upload-", delete=False) as file:
        try:
            await asyncio.to_thread(shutil.copyfileobj, upload.file, file, 2**20)
            file.flush()
            yield file.name
        finally:
            os.unlink(file.name)


async def digest(upload: UploadFile) -> str:
    """What tells an upload from others."""

    def read() -> str:
        whole = hashlib.file_digest(upload.file, "sha256").hexdigest()  # type: ignore[arg-type]
        upload.file.seek(0)
        return whole

    return await asyncio.to_thread(read)
