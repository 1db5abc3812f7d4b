"""Decoding in worker processes: an upload that harms its process does not change the chunks of others."""

import asyncio
import contextlib
import os
import pickle
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import serve.decode.decoder
from graft.audio.spans import probe
from graft.errors import AudioError, AudioTooLong
from serve.decode.decoder import UNDECODABLE, Decoder
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


async def finish_order(decoder: Decoder, uploads: dict[str, tuple[str, str]]) -> list[str]:
    """Decode uploads, each a path and a client, together; returns their names in the order in which they end."""
    ended: list[str] = []

    async def decode(name: str, path: str, client: str) -> None:
        await decoder(path, client)
        ended.append(name)

    await asyncio.gather(*(decode(name, *upload) for name, upload in uploads.items()))
    return ended


@pytest.mark.parametrize("processes", [1, 2])
def test_long_silences_of_one_client_do_not_delay_another(tmp_path, processes):
    """The silences have fewer bytes than the clip. At most one of them has begun when the clip comes."""
    (tmp_path / "silence.flac").write_bytes(hostile_files.silence(600))
    silence = str(tmp_path / "silence.flac")
    assert Path(silence).stat().st_size < Path(CLIPS[0]).stat().st_size
    uploads = {f"silence {number}": (silence, "greedy") for number in range(4)} | {"clip": (CLIPS[0], "other")}
    with open_decoder(processes=processes) as decoder:
        assert "clip" in asyncio.run(finish_order(decoder, uploads))[: 3 - processes]


def test_long_uploads_of_several_clients_take_turns_and_short_ones_come_first(tmp_path):
    for seconds in (100, 200, 400):
        (tmp_path / f"{seconds}.flac").write_bytes(hostile_files.silence(seconds))
    long = {f"a{number}": (str(tmp_path / "400.flac"), "a") for number in range(3)}
    shorter = {f"a{seconds} s": (str(tmp_path / f"{seconds}.flac"), "a") for seconds in (200, 100)}
    with open_decoder(processes=1) as decoder:
        uploads = {**long, **shorter, "b": (str(tmp_path / "400.flac"), "b"), "clip": (CLIPS[0], "a")}
        order = asyncio.run(finish_order(decoder, uploads))
    assert order.index("clip") < order.index("a100 s") < order.index("a200 s") < order.index("a0") < order.index("a1")
    assert order.index("b") < order.index("a0")


def test_an_upload_whose_header_is_false_waits_like_a_long_one(tmp_path):
    """The header of a webm file says one second instead of 100."""
    file = bytearray(media.encode(np.zeros((4_800_000, 1), np.float32), 48_000, "libopus", "webm"))
    place = file.index(b"\x44\x89\x88") + 3  # the element Duration, a float of 8 bytes
    file[place : place + 8] = struct.pack(">d", 1_000.0)
    (tmp_path / "false.webm").write_bytes(file)
    false = str(tmp_path / "false.webm")
    assert (probe(false).duration_s or 0) == pytest.approx(1)
    with open_decoder(processes=2) as decoder:
        assert asyncio.run(decoder(false)).duration_s == pytest.approx(100, abs=0.1)
        uploads = {f"false {number}": (false, "a") for number in range(3)} | {"clip": (CLIPS[0], "a")}
        assert asyncio.run(finish_order(decoder, uploads))[0] == "clip"
    with open_decoder(max_duration_s=90) as decoder, pytest.raises(AudioTooLong, match="over the limit of 90 s"):
        asyncio.run(decoder(false))


def test_an_upload_that_is_slow_to_read_leaves_the_process_for_short_ones(endless, monkeypatch):
    monkeypatch.setattr(serve.decode.decoder, "SHORT_TIMEOUT_S", 0.5)

    async def run(decoder: Decoder) -> None:
        slow = asyncio.create_task(decoder(endless, "a"))
        for clip in CLIPS:  # after the first half second, no process but the first is free
            await decoder(clip, "a")
            await asyncio.sleep(0.3)
        assert not slow.done()
        slow.cancel()

    with open_decoder(processes=2) as decoder:
        asyncio.run(run(decoder))
