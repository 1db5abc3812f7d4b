"""The benchmark of the service, small: clients that tell what they saw of a real server, and all its parts on a tiny graft."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.inference.transcriber import open_transcriber
from jobs.bench import main as bench
from jobs.benchmarks.serve_load import ask_at, ask_for, ask_once
from tests.support import media, tiny_models
from tests.support.http_service import decoder, listener, served

UPLOADS = [path.read_bytes() for path in media.PROMPTS[:4]]


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("serve") / "graft"))


@pytest.fixture
def url(graft: str) -> Iterator[str]:
    """A server without Ray."""
    with (
        decoder(processes=1) as decoding,
        listener(Path(graft)) as hearing,
        served(decoding, hearing, limits={"max_requests": 4}) as url,
    ):
        yield url


def test_clients_tell_of_every_upload(url: str, graft: str) -> None:
    transcriber = open_transcriber(graft)
    texts = [transcriber.transcribe(upload).text for upload in UPLOADS]
    transcriber.close()
    once = ask_once(url, UPLOADS, clients=2)
    assert sorted(answer.upload for answer in once.answers) == [0, 1, 2, 3]
    assert all(answer.text == texts[answer.upload] for answer in once.answers)
    assert once.failed == 0
    assert 0 < once.latency_s(50) <= once.latency_s(95) <= once.wall_s
    assert 0 < once.cpu_share < 1

    over = ask_for(url, [*UPLOADS, b"no audio"], clients=2, seconds=2)
    assert over.failed == sum(answer.upload == 4 for answer in over.answers)
    assert all(answer.sent_s <= 2 for answer in over.answers)

    at_random = ask_at(url, UPLOADS, per_s=5, seconds=2)
    assert 2 <= len(at_random.answers) <= 20
    assert {answer.status for answer in at_random.answers} <= {200, 429}  # nobody waits for others' answers here


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_parts_are_printed_and_written(graft: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.json"
    assert bench(["serve", "--model", graft, "--clients", "4", "--seconds", "6", "--json", str(file)]) == 0
    numbers = json.loads(file.read_text())
    assert list(numbers) == ["saturation", "servers", "replicas"]
    saturation = numbers["saturation"]
    assert 0 < saturation["saturated_busy"] <= 1.01
    assert saturation["saturated_failed"] == saturation["loaded_failed"] == numbers["replicas"]["failed"] == 0
    assert {f"graft {clients} {key}" for clients in (1, 4, 16) for key in ("rtfx", "p50_s", "p95_s", "wer")} <= set(
        numbers["servers"]
    )
    assert numbers["replicas"]["up_s"] > 0
    assert numbers["replicas"]["down_s"] > 0
    assert "speaches is left out" in capsys.readouterr().out
