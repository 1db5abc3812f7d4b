"""No file takes a replica down, stays on the disk, or has paths, keys or tracebacks told to clients or the log."""

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
import requests

from serve.config import ServeArgs
from serve.decode.decoder import DecodeArgs
from serve.http.auth import VARIABLE
from tests.support import hostile_files, media, tiny_models
from tests.support.faults import until
from tests.support.ray_service import Running, serving, spoken

pytestmark = pytest.mark.slow

KEY = "sk-test-of-hostile-files"
FILES, REQUESTS = 500, int(os.environ.get("GRAFT_SOAK_REQUESTS", "10000"))
PROMPT = "Zyxwvuts"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def service(home) -> Iterator[Running]:
    folder = tiny_models.save_tiny_graft(home / "tiny-graft", trained_styles=["formatted"], trained_context=True)
    (home / "uploads").mkdir()
    decode = DecodeArgs(max_duration_s=2_400, timeout_s=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, KEY)
        patch.setenv(
            "RAY_TMPDIR", tempfile.gettempdir()
        )  # or Ray's sockets go with the uploads, to a path that is too long for them
        patch.setenv("TMPDIR", str(home / "uploads"))
        with serving(ServeArgs(model=str(folder), max_upload_bytes=64_000_000, decode=decode)) as running:
            yield running


@pytest.fixture(scope="module")
def session() -> requests.Session:
    asking = requests.Session()
    asking.headers["Authorization"] = f"Bearer {KEY}"
    return asking


def replicas(service: Running) -> list[psutil.Process]:
    found = [*service.replicas("Ingress"), *service.replicas("Engine")]
    assert found
    return found


def hostile(count: int) -> Iterator[tuple[str, bytes]]:
    """All that is crafted, and mutations up to a count of files."""
    files = hostile_files.crafted()
    return itertools.chain(files.items(), hostile_files.mutated(max(0, count - len(files))))


@pytest.mark.timeout(3600)
def test_replicas_outlive_500_files(service, session):
    """Sent four at a time; nothing dies of them, and every answer is a transcript or a refusal."""
    before = {process.pid for process in replicas(service)}
    good = spoken(3)
    expected = service.ask(good, session=session).json()["text"]

    def ask(named: tuple[str, bytes]) -> int:
        name, data = named
        response = service.ask(data, session=session, prompt=PROMPT, response_format="verbose_json")
        assert response.status_code == 200 or 400 <= response.status_code < 500, (
            f"{name}: {response.status_code} {response.text}"
        )
        assert not re.search(rf"Traceback|graft-upload|/\w+/|{KEY}|{PROMPT}", response.text), f"{name}: {response.text}"
        return response.status_code

    with ThreadPoolExecutor(4) as threads:
        counts = Counter(threads.map(ask, hostile(FILES)))
    print(f"{FILES} files, by status: {dict(counts)}")
    assert service.ask(good, session=session).json()["text"] == expected
    assert {process.pid for process in replicas(service)} == before
    assert counts.total() == FILES
    assert counts[200] > 10
    assert counts[400] > 20
    assert counts[413]  # ten hours of silence


def test_a_file_that_kills_its_decoder_harms_no_other(service, session, home):
    """A decoder is ended while it has a long upload in hand, and others wait, some of them for this decoder."""
    long, uploads = spoken(900), [spoken(3), spoken(90)]
    with ThreadPoolExecutor(9) as threads:
        expected = [service.ask(upload, session=session).json()["text"] for upload in uploads]
        killed = threads.submit(service.ask, long, session=session)
        until(lambda: bool(decoding(service)))
        (decoder,) = decoding(service)
        answers = [threads.submit(service.ask, uploads[number % 2], session=session) for number in range(8)]
        until(lambda: len(list(home.glob("uploads/**/graft-upload-*"))) > 2)
        decoder.kill()
        assert killed.result().status_code == 400
        assert killed.result().json()["error"]["code"] == "invalid_audio"
        told = [answer.result() for answer in answers]
    assert [answer.status_code for answer in told] == [200] * 8
    assert [answer.json()["text"] for answer in told] == expected * 4


def decoding(service: Running) -> list[psutil.Process]:
    """The decoders that have an upload open."""
    return [
        decoder for decoder in decoders(service) if any("graft-upload" in file.path for file in decoder.open_files())
    ]


def decoders(service: Running) -> list[psutil.Process]:
    """The processes that decode: forked by the one that the ingress started for it."""
    (ingress,) = service.replicas("Ingress")
    (server,) = [child for child in ingress.children() if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    assert server.children()
    return server.children()


@pytest.mark.timeout(7200)
def test_memory_is_flat(service, session):
    """Over 10,000 requests, one in ten of them hostile."""
    clips = [path.read_bytes() for path in media.PROMPTS[:8]]
    bad = [data for _, data in itertools.islice(hostile_files.mutated(200, seed=1), 200)]
    curve: list[int] = []

    def ask(number: int) -> None:
        data = bad[number // 10 % len(bad)] if number % 10 == 0 else clips[number % len(clips)]
        assert service.ask(data, session=session).status_code in (200, 400)

    with ThreadPoolExecutor(4) as threads:
        for part in range(20):
            list(threads.map(ask, range(part * REQUESTS // 20, (part + 1) * REQUESTS // 20)))
            curve.append(megabytes([*replicas(service), *decoders(service)]))
    print(f"MB after every {REQUESTS // 20} requests: {curve}")
    assert max(curve[-5:]) < 1.05 * max(curve[4:9])


def megabytes(processes: list[psutil.Process]) -> int:
    """Of memory that they hold; a decoder may end meanwhile, after its thousandth upload."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total // 2**20


def test_neither_disk_nor_log_keeps_anything(service, session, home):
    """After all that has happened here."""
    service.ask(spoken(2), session=session, prompt=PROMPT)
    requests.get(f"{service.url}/v1/models", headers={"Authorization": f"Bearer {KEY}wrong"}, timeout=60)
    assert not list((home / "uploads").glob("**/graft-upload-*"))
    logs = list(session_logs())
    assert any("/v1/audio/transcriptions" in text for _, text in logs)
    for name, text in logs:
        for secret in (KEY, PROMPT, "graft-upload", "Traceback", "libmpg123", str(home)):
            assert secret not in text, f"{name}: {text[max(0, text.index(secret) - 500) :][:1000]}"


def session_logs() -> Iterator[tuple[str, str]]:
    """What replicas and the proxy have written and printed in this Ray's session."""
    import ray

    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    pids = re.compile(r"worker-.*-(\d+)\.(out|err)")
    own = {
        str(process.pid)
        for process in psutil.Process().children(recursive=True)
        if "ServeReplica" in " ".join(process.cmdline())
    }
    for file in folder.rglob("*"):
        told = file.parent.name == "serve" and file.name.startswith(("replica_", "proxy_"))
        printed = (match := pids.match(file.name)) and match[1] in own
        if file.is_file() and (told or printed):
            yield file.name, file.read_text(errors="replace")
