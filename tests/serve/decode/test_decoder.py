"""Decoding in worker processes: an upload that harms its process does not change the chunks of others."""

import asyncio
import contextlib
import os
import pickle
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from graft.errors import AudioError
from serve.decode.decoder import UNDECODABLE
from tests.support import hostile_files, media
from tests.support.faults import until
from tests.support.http_service import open_decoder
from tests.support.isolated import isolated_processes

pytestmark = pytest.mark.processes

CLIPS = [str(path) for path in media.PROMPTS[:4]]
LIMITS = {"memory_bytes": 2**28, "max_duration_s": 40_000}


@pytest.fixture(scope="module")
def undisturbed() -> list[bytes]:
    """The results for the clips, pickled, from a decoder that has nothing else to do."""
    with open_decoder(processes=1) as decoder:
        return [pickle.dumps(asyncio.run(decoder(clip))) for clip in CLIPS]


@pytest.fixture
def endless(tmp_path: Path) -> str:
    """A pipe to which nobody writes, so that whoever reads it waits."""
    os.mkfifo(tmp_path / "endless")
    return str(tmp_path / "endless")


@contextlib.contextmanager
def being_read(pipe: str) -> Iterator[None]:
    """Wait until a process reads the pipe, and keep it waiting until the block ends."""

    def open_for_writing() -> bool:
        with contextlib.suppress(OSError):  # nobody reads it yet
            descriptors.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(descriptors)

    descriptors: list[int] = []
    until(open_for_writing)
    yield
    os.close(descriptors[0])


async def decode_beside(
    bad: str, act: Callable[[asyncio.Task], Awaitable[None]], *, timeout_s: float = 60
) -> tuple[list[bytes], BaseException]:
    """Decode the clips behind a bad upload in one process, and do something to that upload.

    Returns the clips' results, pickled, and the bad upload's error.
    """
    with open_decoder(processes=1, timeout_s=timeout_s, **LIMITS) as decoder:
        first = asyncio.create_task(decoder(bad))
        await asyncio.sleep(0)
        others = [asyncio.create_task(decoder(clip)) for clip in CLIPS]
        await act(first)
        results = [pickle.dumps(await other) for other in others]
        (error,) = await asyncio.gather(first, return_exceptions=True)
        return results, error


async def do_nothing(_: asyncio.Task) -> None:
    pass


def test_an_upload_whose_process_is_killed_harms_no_other(endless, undisturbed):
    async def kill(_: asyncio.Task) -> None:
        def kill_reader() -> None:
            with being_read(endless):
                (process,) = isolated_processes()
                process.kill()

        await asyncio.to_thread(kill_reader)

    results, error = asyncio.run(decode_beside(endless, kill))
    assert results == undisturbed
    assert (type(error), str(error)) == (AudioError, UNDECODABLE)


def test_an_upload_that_takes_too_long_harms_no_other(endless, undisturbed):
    results, error = asyncio.run(decode_beside(endless, do_nothing, timeout_s=3))
    assert results == undisturbed
    assert isinstance(error, AudioError)
    assert "decoding took longer than 3 s" in str(error)


def test_an_upload_that_takes_too_much_memory_harms_no_other(tmp_path, undisturbed):
    (tmp_path / "long.flac").write_bytes(hostile_files.silence(36_000))
    results, error = asyncio.run(decode_beside(str(tmp_path / "long.flac"), do_nothing))
    assert results == undisturbed
    assert (type(error), str(error)) == (AudioError, UNDECODABLE)


def test_cancelling_an_upload_kills_its_process_and_harms_no_other(endless, undisturbed):
    async def cancel(task: asyncio.Task) -> None:
        def cancel_while_read() -> None:
            with being_read(endless):
                (process,) = isolated_processes()
                loop.call_soon_threadsafe(task.cancel)
                until(lambda: process not in isolated_processes())

        loop = asyncio.get_running_loop()
        await asyncio.to_thread(cancel_while_read)

    results, error = asyncio.run(decode_beside(endless, cancel))
    assert results == undisturbed
    assert isinstance(error, asyncio.CancelledError)


def test_closing_a_decoder_ends_running_and_waiting_uploads(endless):
    async def run() -> list[BaseException]:
        with contextlib.ExitStack() as reading, open_decoder(processes=1) as decoder:
            uploads = [asyncio.create_task(decoder(path)) for path in (endless, *CLIPS)]
            await asyncio.sleep(0)
            await asyncio.to_thread(reading.enter_context, being_read(endless))
        return await asyncio.gather(*uploads, return_exceptions=True)

    running, *waiting = asyncio.run(run())
    assert isinstance(running, AudioError)
    assert [type(one) for one in waiting] == [asyncio.CancelledError] * 4
    assert not isolated_processes()
