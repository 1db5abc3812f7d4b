"""A service without an engine says so in bounded time, and one whose engine is only busy stays ready."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from serve.backends.ray_handle import MAX_SILENCE_S, MAX_WAIT_S
from serve.config import ServeArgs
from tests.support import tiny_models
from tests.support.faults import until
from tests.support.media import SHORTEST_FIRST
from tests.support.ray_service import RunningService, serving, speech_flac

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow, pytest.mark.ray]

AUDIO = SHORTEST_FIRST[0].read_bytes()
MAX_CHUNKS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft of this file's own, because it is moved away."""
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("ready") / "tiny-graft")


@pytest.fixture(scope="module")
def service(ray_started: None, model: Path) -> Iterator[RunningService]:
    with serving(ServeArgs(model=str(model), max_ongoing_chunks=MAX_CHUNKS)) as running:
        yield running


def ready(service: RunningService) -> int:
    return requests.get(f"{service.url}/readyz", timeout=20).status_code


def assert_not_ready(response: requests.Response) -> None:
    assert response.status_code == 503, response.text
    assert int(response.headers["Retry-After"]) > 0
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "not_ready")


def test_a_saturated_engine_stays_ready(service: RunningService) -> None:
    long = speech_flac(900)
    with ThreadPoolExecutor(3) as clients:
        asked = [clients.submit(service.ask, long) for _ in range(3)]
        answers = set()
        while not any(one.done() for one in asked):
            answers.add(ready(service))
            time.sleep(0.5)
        assert answers == {200}
        assert [one.result().status_code for one in asked] == [200] * 3


def test_an_engine_that_hangs_is_not_ready(service: RunningService) -> None:
    assert ready(service) == 200
    (engine,) = service.replicas("Engine")
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        until(lambda: ready(service) == 503)
        assert MAX_SILENCE_S / 2 < time.monotonic() - start < 2 * MAX_SILENCE_S
        assert_not_ready(service.ask(AUDIO))
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    until(lambda: ready(service) == 200)
    assert service.ask(AUDIO).status_code == 200


def test_without_an_engine_requests_are_refused_and_those_that_wait_get_an_answer(
    service: RunningService, model: Path
) -> None:
    assert ready(service) == 200
    text = service.ask(AUDIO).json()["text"]
    away = model.rename(model.with_name("away"))  # no engine can start now
    try:
        service.kill("Engine")
        start = time.monotonic()
        with ThreadPoolExecutor(1) as clients:
            waiting = clients.submit(service.ask, AUDIO)
            until(lambda: ready(service) == 503)
            assert time.monotonic() - start < 2 * MAX_SILENCE_S
            asked = time.monotonic()
            assert_not_ready(service.ask(AUDIO))
            assert_not_ready(service.get("/v1/models"))
            assert time.monotonic() - asked < 5
            assert_not_ready(waiting.result())
            assert time.monotonic() - start < 1.5 * MAX_WAIT_S
    finally:
        away.rename(model)
    until(lambda: ready(service) == 200)
    assert service.ask(AUDIO).json()["text"] == text


def test_the_application_itself_bounds_a_request(ray_started: None, model: Path) -> None:
    """It has no HTTP options where `serve run serve.app:build` starts it."""
    with serving(ServeArgs(model=str(model), request_timeout_s=4)) as service:
        response = service.ask(speech_flac(1200))
        assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")
        until(lambda: service.chunks_in_engine() == 0)
        assert service.ask(AUDIO).status_code == 200
