"""Hostile files end no replica, stay on no disk, and bring no path, key or traceback into responses and logs."""

import contextlib
import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from serve.config import ServeArgs
from serve.decode.decoder import DecodeArgs
from serve.http.middleware import KEYS_VARIABLE
from tests.support import hostile_files, media, tiny_models
from tests.support.faults import until
from tests.support.isolated import forked_by_forkservers
from tests.support.ray_service import RunningService, own_ray, serving, speech_flac

pytestmark = [pytest.mark.slow, pytest.mark.ray]

KEY = "sk-test-of-hostile-files"
FILES, REQUESTS = 500, int(os.environ.get("GRAFT_SOAK_REQUESTS", "10000"))
PROMPT = "Zyxwvuts"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def service(home) -> Iterator[RunningService]:
    """An application on a Ray of its own, whose processes keep temporary files below `home`."""
    folder = tiny_models.save_tiny_graft(home / "tiny-graft", trained_styles=["formatted"], trained_context=True)
    (home / "uploads").mkdir()
    decode = DecodeArgs(max_duration_s=2_400, timeout_s=120)
    args = ServeArgs(model=str(folder), max_upload_bytes=64_000_000, decode=decode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEYS_VARIABLE, KEY)
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # else Ray's sockets get paths that are too long for them
        patch.setenv("TMPDIR", str(home / "uploads"))
        with own_ray(), serving(args, key=KEY) as running:
            yield running


def all_replicas(service: RunningService) -> list[psutil.Process]:
    found = [*service.replicas("Ingress"), *service.replicas("Engine")]
    assert found
    return found


def hostile(count: int) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of all crafted files, and of mutated ones up to a count."""
    files = hostile_files.crafted()
    return itertools.chain(files.items(), hostile_files.mutated(max(0, count - len(files))))


@pytest.mark.timeout(3600)
def test_replicas_survive_500_files(service):
    """Every response is a transcript or a client error."""
    before = {process.pid for process in all_replicas(service)}
    good = speech_flac(3)
    expected = service.ask(good).json()["text"]

    def ask(named: tuple[str, bytes]) -> int:
        name, data = named
        response = service.ask(data, prompt=PROMPT, response_format="verbose_json")
        assert response.status_code == 200 or 400 <= response.status_code < 500, (
            f"{name}: {response.status_code} {response.text}"
        )
        assert not re.search(rf"Traceback|graft-upload|/\w+/|{KEY}|{PROMPT}", response.text), f"{name}: {response.text}"
        return response.status_code

    with ThreadPoolExecutor(4) as threads:
        counts = Counter(threads.map(ask, hostile(FILES)))
    print(f"{FILES} files, by status: {dict(counts)}")
    assert service.ask(good).json()["text"] == expected
    assert {process.pid for process in all_replicas(service)} == before
    assert counts.total() == FILES
    assert counts[200] > 10
    assert counts[400] > 20
    assert counts[413]  # ten hours of silence


def test_the_death_of_a_decoder_fails_only_its_upload(service, home):
    """A decoder is killed while it decodes a long upload and others wait, some of them for the same decoder."""
    long, uploads = speech_flac(900), [speech_flac(3), speech_flac(90)]
    with ThreadPoolExecutor(9) as threads:
        expected = [service.ask(upload).json()["text"] for upload in uploads]
        killed = threads.submit(service.ask, long)
        until(lambda: bool(decoding(service)))
        (decoder,) = decoding(service)
        others = [threads.submit(service.ask, uploads[number % 2]) for number in range(8)]
        until(lambda: len(list(home.glob("uploads/**/graft-upload-*"))) > 2)
        decoder.kill()
        assert killed.result().status_code == 400
        assert killed.result().json()["error"]["code"] == "invalid_audio"
        responses = [other.result() for other in others]
    assert [response.status_code for response in responses] == [200] * 8
    assert [response.json()["text"] for response in responses] == expected * 4


def decoding(service: RunningService) -> list[psutil.Process]:
    """Return the decoding processes that have an upload open."""
    return [
        decoder for decoder in decoders(service) if any("graft-upload" in file.path for file in decoder.open_files())
    ]


def decoders(service: RunningService) -> list[psutil.Process]:
    """Return the decoding processes, which the forkserver of the ingress replica has forked."""
    (ingress,) = service.replicas("Ingress")
    found = forked_by_forkservers(ingress)
    assert found
    return found


@pytest.mark.timeout(7200)
def test_memory_is_flat(service):
    """Send 10,000 requests, one in ten of them hostile."""
    clips = [path.read_bytes() for path in media.PROMPTS[:8]]
    bad = [data for _, data in itertools.islice(hostile_files.mutated(200, seed=1), 200)]
    curve: list[int] = []

    def ask(number: int) -> None:
        data = bad[number // 10 % len(bad)] if number % 10 == 0 else clips[number % len(clips)]
        assert service.ask(data).status_code in (200, 400)

    with ThreadPoolExecutor(4) as threads:
        for part in range(20):
            list(threads.map(ask, range(part * REQUESTS // 20, (part + 1) * REQUESTS // 20)))
            curve.append(megabytes([*all_replicas(service), *decoders(service)]))
    print(f"MB after every {REQUESTS // 20} requests: {curve}")
    assert max(curve[-5:]) < 1.05 * max(curve[4:9])


def megabytes(processes: list[psutil.Process]) -> int:
    """Add up resident memory in MiB. A decoder may end meanwhile, after its thousandth upload."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total // 2**20


def test_neither_disk_nor_log_keeps_anything(service, home):
    """This looks at what all tests of this file have left behind."""
    service.ask(speech_flac(2), prompt=PROMPT)
    assert service.get("/v1/models", key=f"{KEY}wrong").status_code == 401
    assert not list((home / "uploads").glob("**/graft-upload-*"))
    logs = list(session_logs())
    assert any("/v1/audio/transcriptions" in text for _, text in logs)
    for name, text in logs:
        for secret in (KEY, PROMPT, "graft-upload", "Traceback", "libmpg123", str(home)):
            assert secret not in text, f"{name}: {text[max(0, text.index(secret) - 500) :][:1000]}"


def session_logs() -> Iterator[tuple[str, str]]:
    """Yield the names and texts of the files to which this Ray's replicas and proxies have logged and printed."""
    import ray

    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    pids = re.compile(r"worker-.*-(\d+)\.(out|err)")
    own = {
        str(process.pid)
        for process in psutil.Process().children(recursive=True)
        if "ServeReplica" in " ".join(process.cmdline())
    }
    for file in folder.rglob("*"):
        is_log = file.parent.name == "serve" and file.name.startswith(("replica_", "proxy_"))
        is_output = (match := pids.match(file.name)) and match[1] in own
        if file.is_file() and (is_log or is_output):
            yield file.name, file.read_text(errors="replace")
