"""Whatever fits the described API, or does not, gets an answer that the description foresees."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.support import media, tiny_models
from tests.support.http_service import decoder, listener, served

KEY = "sk-test-of-the-schema"
CLIP = media.SHORTEST_FIRST[0].read_bytes()
TRANSCRIBE = ("/v1/audio/transcriptions", "POST")
OTHERS = [("/v1/models", "GET"), ("/v1/models/{model}", "GET"), ("/healthz", "GET"), ("/readyz", "GET")]


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder = tiny_models.save_tiny_graft(
        tmp_path_factory.mktemp("schema") / "tiny-graft", trained_styles=["formatted"], trained_context=True
    )
    with decoder() as decoding, listener(folder) as hearing, served(decoding, hearing, keys=(KEY,)) as address:
        yield address


def hold(url: str, operation: tuple[str, str], mode: GenerationMode, count: int, *, real: bool = False) -> set[int]:
    """Ask in so many ways; returns the statuses. With `real`, for what is there and with audio."""
    path, method = operation
    described = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method]
    statuses = set()

    @given(case=described.as_strategy(generation_mode=mode))
    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def check(case: Case) -> None:
        if real and isinstance(case.body, dict):
            case.body |= {"file": CLIP, "model": "tiny-graft"}
        # An upload of noise fits the description, and real audio in place of noise may mend what did not.
        excluded = [positive_data_acceptance, *([negative_data_rejection] if real else [])]
        headers = {"Authorization": f"Bearer {KEY}"}
        statuses.add(case.call_and_validate(url, headers=headers, excluded_checks=excluded).status_code)

    check()
    return statuses


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("real", [False, True])
def test_transcriptions_are_as_described(url, mode, real):
    statuses = hold(url, TRANSCRIBE, mode, 20, real=real)
    assert (200 in statuses) or not real


@pytest.mark.parametrize("operation", OTHERS, ids=lambda operation: operation[0])
def test_the_rest_is_as_described(url, operation):
    hold(url, operation, GenerationMode.POSITIVE, 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("real", [False, True])
def test_many_more_transcriptions_are_as_described(url, mode, real):
    print(hold(url, TRANSCRIBE, mode, 500, real=real))
