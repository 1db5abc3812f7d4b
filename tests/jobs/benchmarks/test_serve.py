"""The benchmark of the service, small: clients that report what a real server answers, and all of its parts."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.inference.transcriber import open_transcriber
from jobs.bench import main as bench
from jobs.benchmarks.service import ask
from tests.support import media, tiny_models
from tests.support.http_service import open_backend, open_decoder, serve_api

UPLOADS = [path.read_bytes() for path in media.PROMPTS[:4]]


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("serve") / "graft"))


@pytest.fixture
def url(graft: str) -> Iterator[str]:
    """Run a server without Ray."""
    with (
        open_decoder(processes=1) as decoder,
        open_backend(Path(graft)) as backend,
        serve_api(decoder, backend, limits={"max_requests": 4}) as url,
    ):
        yield url


@pytest.mark.slow
def test_clients_report_every_upload(url: str, graft: str) -> None:
    transcriber = open_transcriber(graft)
    texts = [transcriber.transcribe(upload).text for upload in UPLOADS]
    transcriber.close()
    once, numbers = ask(url, UPLOADS, clients=2)
    assert sorted(answer.upload for answer in once) == [0, 1, 2, 3]
    assert all(answer.text == texts[answer.upload] for answer in once)
    assert numbers["failed"] == 0
    assert 0 < numbers["p50_s"] <= numbers["p95_s"] <= numbers["seconds"]
    assert 0 < numbers["clients_cpu"] < 1

    over, numbers = ask(url, [*UPLOADS, b"no audio"], clients=2, seconds=2)
    assert numbers["failed"] == sum(answer.upload == 4 for answer in over)
    longest = max(answer.seconds for answer in over)
    assert numbers["seconds"] <= 2 + longest  # nothing is sent after two seconds

    at_random, _ = ask(url, UPLOADS, per_s=5, seconds=2)
    assert len(at_random) == 10
    assert {answer.status for answer in at_random} <= {200, 429}  # nobody waits for others' answers here


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_parts_are_printed_and_written(graft: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.json"
    assert bench(["serve", "--model", graft, "--clients", "4", "--seconds", "6", "--json", str(file)]) == 0
    numbers = json.loads(file.read_text())
    assert list(numbers) == ["saturation", "servers", "replicas"]
    saturation = numbers["saturation"]
    assert 0 < saturation["saturated_busy"] <= 1.01
    assert saturation["saturated_failed"] == saturation["loaded_failed"] == numbers["replicas"]["failed"] == 0
    keys = ("audio s/s", "p50_s", "p95_s", "WER %")
    assert {f"graft {clients} {key}" for clients in (1, 4, 16) for key in keys} <= set(numbers["servers"])
    assert numbers["replicas"]["up_s"] > 0
    assert numbers["replicas"]["down_s"] > 0
    assert "faster-whisper" in capfd.readouterr().out
