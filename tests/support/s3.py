"""Run an S3 server on a loopback port."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs
import pytest


@contextmanager
def serve(folder: Path, to: str) -> Iterator[str]:
    """Run a server that holds a folder's files at `to` (BUCKET/FOLDER) until the block ends; yields its address.

    Inside the block, the environment holds its keys.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = ":".join(map(str, server.get_host_and_port()))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        try:
            client = pafs.S3FileSystem(
                endpoint_override=address, scheme="http", region="us-east-1", allow_bucket_creation=True
            )
            client.create_dir(to.partition("/")[0])
            pafs.copy_files(str(folder), to, destination_filesystem=client)
            yield address
        finally:
            server.stop()
