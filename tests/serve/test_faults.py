"""Twenty clients of a service whose replicas are killed: no text is wrong or doubled, and no abandoned work goes on."""

import contextlib
import http.client
import random
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from serve.config import ServeArgs
from serve.decode.decoder import DecodeArgs
from tests.support.faults import processes, until
from tests.support.isolated import is_alive
from tests.support.ray_service import (
    Clients,
    RunningService,
    replica_log_records,
    scrape_metrics,
    serving,
    speech_flac,
)

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow, pytest.mark.ray]

CLIENTS = 20
UPLOADS = [speech_flac(seconds, first=10 * number) for number, seconds in enumerate([3, 9, 20, 45])]


@pytest.fixture(scope="module")
def service(ray_started, graft_folder) -> Iterator[RunningService]:
    """An application of this file's own, because its replicas are killed."""
    decode = DecodeArgs(timeout_s=300)
    args = ServeArgs(model=str(graft_folder), max_ongoing_chunks=128, max_upload_bytes=2**27, decode=decode)
    with serving(args) as running:
        yield running


@pytest.fixture(scope="module")
def texts(service) -> list[str]:
    """The undisturbed service's transcripts of the uploads."""
    return [service.ask(upload).json()["text"] for upload in UPLOADS]


@pytest.fixture(scope="module")
def streamed_texts(service) -> list[str]:
    return [complete_text(list(service.stream(upload))) for upload in UPLOADS]


def complete_text(events: list[dict[str, Any]]) -> str:
    """Return the text of a stream that ended without an error."""
    assert events[-1]["type"] == "transcript.text.done", events[-1]
    assert "".join(event["delta"] for event in events[:-1]) == events[-1]["text"]
    return events[-1]["text"]


def with_next_upload(ask: Callable[[int], None]) -> Callable[[int], None]:
    """Return a client that sends another upload at each call."""
    return lambda number: ask(number % len(UPLOADS))


def test_clients_do_not_notice_the_death_of_the_engine(service, texts, streamed_texts):
    def ask(upload: int) -> None:
        response = service.ask(UPLOADS[upload])
        assert (response.status_code, response.json().get("text")) == (200, texts[upload])

    def stream(upload: int) -> None:
        assert complete_text(list(service.stream(UPLOADS[upload]))) == streamed_texts[upload]

    clients = Clients([with_next_upload(ask)] * 16 + [with_next_upload(stream)] * 4)
    clients.wait_for(CLIENTS)
    until(lambda: service.chunks_in_engine() >= 5)
    before = logged_deaths()
    dead = service.kill("Engine")
    wait_for_recovery(service, "Engine")
    clients.wait_for(2 * CLIENTS)
    clients.stop()
    (engine,) = service.replicas("Engine")
    assert engine.pid != dead
    resubmitted = logged_deaths() - before
    assert resubmitted.total() >= 5
    assert {tries_left for tries_left, _ in resubmitted} == {1}


def logged_deaths() -> Counter[tuple[int, float]]:
    """Count the records of chunks whose engine replica died, by the attempts that are left and the chunk's start."""
    return Counter(
        (record["tries_left"], record["chunk_start_s"])
        for record in replica_log_records()
        if record["message"] == "an engine replica died"
    )


def wait_for_recovery(service: RunningService, died: str) -> None:
    """Check that a new request is answered within half a minute after a death."""
    start, status = time.monotonic(), 0
    while status != 200:
        with contextlib.suppress(requests.RequestException):
            status = service.ask(UPLOADS[0]).status_code
        took_s = time.monotonic() - start
    print(f"{took_s:.1f} s after the death of the {died} a new request was answered")
    assert took_s < 30


def test_repeated_requests_get_the_same_text_after_the_death_of_the_ingress(service, texts, streamed_texts):
    statuses: list[int] = []
    broken: list[str] = []

    def ask(upload: int) -> None:
        key = uuid.uuid4().hex
        while True:
            response = service.ask(UPLOADS[upload], headers={"Idempotency-Key": key})
            statuses.append(response.status_code)
            if response.status_code == 200:
                assert response.json()["text"] == texts[upload]
                return
            assert response.status_code == 503, response.text
            assert response.json()["error"]["type"] == "server_error"
            time.sleep(float(response.headers["Retry-After"]))

    def stream(upload: int) -> None:
        events: list[dict[str, Any]] = []
        try:
            events.extend(service.stream(UPLOADS[upload]))
        except AssertionError:  # the response was an error, not a stream
            time.sleep(0.5)
        except requests.exceptions.ChunkedEncodingError:
            broken.append("".join(event["delta"] for event in events))
            assert streamed_texts[upload].startswith(broken[-1])
        else:
            assert complete_text(events) == streamed_texts[upload]

    clients = Clients([with_next_upload(ask)] * 16 + [with_next_upload(stream)] * 4)
    clients.wait_for(CLIENTS)
    until(lambda: service.chunks_in_engine() >= 5)
    decoders = service.replicas("Ingress")[0].children(recursive=True)
    service.kill("Ingress")
    wait_for_recovery(service, "Ingress")
    clients.wait_for(2 * CLIENTS)
    clients.stop()
    assert 503 in statuses
    assert any(broken)
    assert decoders
    until(lambda: not any(map(is_alive, decoders)))
    until(lambda: service.chunks_in_engine() == 0)


def test_the_service_is_reached_again_after_the_death_of_haproxy(service):
    (haproxy,) = processes("/haproxy.cfg")
    haproxy.kill()
    wait_for_recovery(service, "HAProxy")


def test_chunks_whose_engine_dies_twice_are_given_up(service):
    audio = speech_flac(300)
    events: list[dict[str, Any]] = []
    with ThreadPoolExecutor(2) as clients:
        streamed = clients.submit(lambda: events.extend(service.stream(audio)))
        until(lambda: events)  # before its first event, the stream would get a 503, too
        whole = clients.submit(service.ask, audio)
        for _ in range(2):
            until(lambda: service.chunks_in_engine() >= 5)
            service.kill("Engine")
        response, _ = whole.result(), streamed.result()
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    assert response.json()["error"]["type"] == "server_error"
    assert events[-1]["error"]["type"] == "server_error"
    assert service.ask(UPLOADS[0]).status_code == 200


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_stops_its_transcription(service, is_stream):
    audio = speech_flac(1200)
    before = service.counts().tokens
    with disconnecting(service, audio, stream=is_stream):
        until(lambda: service.chunks_in_engine() >= 3)
    until(lambda: service.chunks_in_engine() == 0)
    time.sleep(0.5)  # for the step that runs
    left = service.counts().tokens
    time.sleep(2)
    assert service.counts().tokens == left
    assert left - before < 1200 * 5  # far fewer than the whole upload takes
    until(lambda: requests_in_hand() == 0)


def test_of_many_clients_that_leave_at_any_moment_none_leaves_work_behind(service, texts):
    """They leave while they send, while their upload is decoded, and while it is transcribed."""
    audio, chance = speech_flac(300), random.Random(0)

    def leave(number: int) -> None:
        with disconnecting(service, audio, stream=number % 2 == 0):
            time.sleep(chance.uniform(0, 1.5))

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(leave, range(150)))
    left = time.monotonic()
    until(lambda: service.chunks_in_engine() == 0)
    until(lambda: requests_in_hand() == 0)
    assert time.monotonic() - left < 20
    assert service.ask(UPLOADS[0]).json()["text"] == texts[0]


def requests_in_hand() -> float:
    """Return what the ingress exports once a second."""
    return sum(scrape_metrics("ray_graft_requests_in_hand")["ray_graft_requests_in_hand"].values())


def test_with_an_idempotency_key_a_request_is_completed_although_its_client_leaves(service):
    audio, headers = speech_flac(120), {"Idempotency-Key": uuid.uuid4().hex}
    with disconnecting(service, audio, headers=headers):
        until(lambda: service.chunks_in_engine() >= 3)
    until(lambda: service.chunks_in_engine() == 0)
    tokens = service.counts().tokens
    response = service.ask(audio, headers=headers)
    assert (response.status_code, service.counts().tokens) == (200, tokens)
    assert response.json()["text"] == service.ask(audio).json()["text"]


@contextlib.contextmanager
def disconnecting(
    service: RunningService, audio: bytes, *, stream: bool = False, headers: dict[str, str] | None = None
) -> Iterator[None]:
    """Send an upload, and disconnect when the block ends."""
    request = requests.Request(
        "POST",
        f"{service.url}/v1/audio/transcriptions",
        headers=headers,
        files={"file": ("a.flac", audio)},
        data={"model": "tiny-graft", "stream": str(stream).lower()},
    ).prepare()
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"))
    connection.request("POST", request.path_url, request.body, dict(request.headers))
    yield
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def test_a_long_upload_does_not_delay_short_ones(service, texts):
    """While 30 minutes of speech are transcribed, requests of 3 s are answered one after the other."""
    waits: list[float] = []
    with ThreadPoolExecutor(1) as clients:
        start = time.monotonic()
        long = clients.submit(service.ask, speech_flac(1800))
        while not long.done():
            sent = time.monotonic()
            assert service.ask(UPLOADS[0]).json()["text"] == texts[0]
            waits.append(time.monotonic() - sent)
        assert long.result().status_code == 200
    took_s = time.monotonic() - start
    median_s = sorted(waits)[len(waits) // 2]
    print(f"30 minutes took {took_s:.1f} s; meanwhile {len(waits)} requests of 3 s took {median_s:.2f} s in the median")
    print(f"and {max(waits):.2f} s at most")
    assert len(waits) > 10
    assert max(waits) < took_s / 5
