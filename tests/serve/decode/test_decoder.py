"""Uploads in processes of their own: whatever one does to its process, the chunks of others are as alone."""

import asyncio
import contextlib
import os
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from graft.errors import AudioError
from serve.decode.decoder import DAMAGED
from tests.support import hostile_files, media
from tests.support.faults import until
from tests.support.http_service import decoder
from tests.support.isolated import isolated_processes

CLIPS = [str(path) for path in media.PROMPTS[:4]]
LIMITS = {"memory_bytes": 2**28, "max_duration_s": 40_000}


@pytest.fixture(scope="module")
def alone() -> list[bytes]:
    with decoder(processes=1) as decoding:
        return [pickle.dumps(asyncio.run(decoding(clip))) for clip in CLIPS]


@pytest.fixture
def stuck(tmp_path: Path) -> str:
    """A file that nobody writes to: whoever reads it waits."""
    os.mkfifo(tmp_path / "stuck")
    return str(tmp_path / "stuck")


@contextlib.contextmanager
def read(stuck: str):
    """While the block runs, somebody reads the file."""

    def is_read() -> bool:
        with contextlib.suppress(OSError):  # nobody does yet
            held.append(os.open(stuck, os.O_WRONLY | os.O_NONBLOCK))
        return bool(held)

    held: list[int] = []
    until(is_read)
    yield
    os.close(held[0])


async def beside(
    bad: str, act: Callable[[asyncio.Task], Awaitable[None]], *, timeout_s: float = 60
) -> tuple[list[bytes], BaseException]:
    """Uploads that wait for the one process behind a bad one, to which something is done; and what became of that."""
    with decoder(processes=1, timeout_s=timeout_s, **LIMITS) as decoding:
        first = asyncio.create_task(decoding(bad))
        await asyncio.sleep(0)
        others = [asyncio.create_task(decoding(clip)) for clip in CLIPS]
        await act(first)
        told = [pickle.dumps(await other) for other in others]
        (error,) = await asyncio.gather(first, return_exceptions=True)
        return told, error


async def nothing(_: asyncio.Task) -> None:
    """It is left to itself."""


def test_an_upload_that_kills_its_process_harms_no_other(stuck, alone):
    async def kill(_: asyncio.Task) -> None:
        def at_once() -> None:
            with read(stuck):
                (process,) = isolated_processes()
                process.kill()

        await asyncio.to_thread(at_once)

    told, error = asyncio.run(beside(stuck, kill))
    assert told == alone
    assert (type(error), str(error)) == (AudioError, DAMAGED)


def test_an_upload_that_takes_too_long_harms_no_other(stuck, alone):
    told, error = asyncio.run(beside(stuck, nothing, timeout_s=3))
    assert told == alone
    assert isinstance(error, AudioError)
    assert "not decoded within 3 s" in str(error)


def test_an_upload_that_takes_too_much_memory_harms_no_other(tmp_path, alone):
    (tmp_path / "long.flac").write_bytes(hostile_files.silence(36_000))
    told, error = asyncio.run(beside(str(tmp_path / "long.flac"), nothing))
    assert told == alone
    assert (type(error), str(error)) == (AudioError, DAMAGED)


def test_an_upload_whose_client_leaves_ends_its_process_and_one_that_waited_is_not_decoded(stuck, alone):
    async def leave(task: asyncio.Task) -> None:
        def end_of_reading() -> None:
            with read(stuck):
                (process,) = isolated_processes()
                loop.call_soon_threadsafe(task.cancel)
                until(lambda: process not in isolated_processes())

        loop = asyncio.get_running_loop()
        await asyncio.to_thread(end_of_reading)

    told, error = asyncio.run(beside(stuck, leave))
    assert told == alone
    assert isinstance(error, asyncio.CancelledError)


def test_closing_ends_what_runs_and_what_waits(stuck):
    async def run() -> list[BaseException]:
        with contextlib.ExitStack() as reading, decoder(processes=1) as decoding:
            asked = [asyncio.create_task(decoding(path)) for path in (stuck, *CLIPS)]
            await asyncio.sleep(0)
            await asyncio.to_thread(reading.enter_context, read(stuck))
        return await asyncio.gather(*asked, return_exceptions=True)

    late, *waiting = asyncio.run(run())
    assert isinstance(late, AudioError)
    assert [type(one) for one in waiting] == [asyncio.CancelledError] * 4
    assert not isolated_processes()
