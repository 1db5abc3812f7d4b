"""Generated requests, valid and invalid by the description in /openapi.json, get only responses that it describes."""

import base64
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from serve.backends.local import LocalBackend
from serve.decode.decoder import Decoder
from tests.support import media
from tests.support.http_service import serve_api

KEY = "sk-test-of-the-schema"
CLIP = media.SHORTEST_FIRST[0].read_bytes()
ENCODED = {"data": base64.b64encode(CLIP).decode()}
TRANSCRIBE = ("/v1/audio/transcriptions", "POST")
OTHERS = [("/v1/models", "GET"), ("/v1/models/{model}", "GET"), ("/healthz", "GET"), ("/readyz", "GET")]


@pytest.fixture(scope="module")
def url(decoder: Decoder, backend: LocalBackend) -> Iterator[str]:
    with serve_api(decoder, backend, keys=(KEY,)) as address:
        yield address


def send_generated(
    url: str, operation: tuple[str, str], mode: GenerationMode, count: int, *, real: bool = False
) -> set[int]:
    """Send generated requests and check each response; with `real`, they name the served model and hold audio.

    Returns the statuses of the responses.
    """
    path, method = operation
    described = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method]
    statuses = set()

    @given(case=described.as_strategy(generation_mode=mode))
    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def check(case: Case) -> None:
        if real and isinstance(case.body, dict):
            audio = {"input_audio": ENCODED} if case.media_type == "application/json" else {"file": CLIP}
            case.body |= audio | {"model": "tiny-graft"}
        # An upload of noise fits the description and is refused; real audio may make an invalid request valid.
        excluded = [positive_data_acceptance, *([negative_data_rejection] if real else [])]
        headers = {"Authorization": f"Bearer {KEY}"}
        statuses.add(case.call_and_validate(url, headers=headers, excluded_checks=excluded).status_code)

    check()
    return statuses


@pytest.mark.seconds
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("real", [False, True])
def test_transcriptions_are_as_described(url, mode, real):
    statuses = send_generated(url, TRANSCRIBE, mode, 20, real=real)
    assert (200 in statuses) or not real


@pytest.mark.parametrize("operation", OTHERS, ids=lambda operation: operation[0])
def test_other_operations_are_as_described(url, operation):
    send_generated(url, operation, GenerationMode.POSITIVE, 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("real", [False, True])
def test_many_more_transcriptions_are_as_described(url, mode, real):
    print(send_generated(url, TRANSCRIBE, mode, 500, real=real))
