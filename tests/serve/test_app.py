"""The application on Ray Serve: its keys, limits and errors over HTTP, and its arguments."""

import asyncio
import dataclasses
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
import soundfile
import yaml
from pydantic import ValidationError

from graft.errors import ModelError
from serve.app import Ingress, build
from serve.config import ServeArgs
from serve.http.middleware import KEYS_VARIABLE, ApiKeys
from tests.support.media import SHORTEST_FIRST, speech, write
from tests.support.paths import ROOT
from tests.support.ray_service import (
    ENVIRONMENT_KEY,
    FILE_KEY,
    MAX_DURATION_S,
    MAX_UPLOAD_BYTES,
    replica_log_records,
)

pytestmark = pytest.mark.xdist_group("serve")

AUTHORIZED = {"Authorization": f"Bearer {FILE_KEY}"}
NO_KEYS = "there are no API keys: requests are not authenticated"
WORDS = {"timestamp_granularities[]": "word"}


def noise_flac(seconds: float) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(0).standard_normal(int(seconds * 16_000)) * 0.1
    soundfile.write(file, samples.astype(np.float32), 16_000, format="flac")
    return file.getvalue()


SHORT_NOISE = noise_flac(0.5)


def assert_error(response, status, *, param, code, message) -> None:
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert message in error["message"]
    assert not any(word in response.text for word in ("Traceback", "/", "\\n")), response.text


def test_keys_of_the_building_process_and_of_the_key_file_are_accepted(service):
    """Ray was started before, with another environment, as with `GRAFT_API_KEYS=... serve run` on a running cluster."""
    without = dataclasses.replace(service, key=None)
    statuses = [without.ask(SHORT_NOISE).status_code]
    statuses += [service.ask(SHORT_NOISE, key=key).status_code for key in ("sk-x", ENVIRONMENT_KEY, FILE_KEY)]
    assert statuses == [401, 401, 200, 200]
    assert not [record for record in replica_log_records() if record["message"] == NO_KEYS]


def test_an_ingress_without_keys_logs_a_warning(monkeypatch, caplog):
    class Handle:
        def options(self, **options: Any) -> "Handle":
            return self

    async def start_ingress(keys: ApiKeys) -> None:
        Ingress(ServeArgs(model="m"), Handle(), keys).__serve_build_asgi_app__()

    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    monkeypatch.setattr("serve.app.Decoder", lambda args: None)
    monkeypatch.setattr("serve.app.log_through_ray_serve", lambda: None)
    asyncio.run(start_ingress(ApiKeys(["sk-mine"])))
    assert NO_KEYS not in caplog.messages
    asyncio.run(start_ingress(ApiKeys()))
    assert NO_KEYS in caplog.messages


def test_responses_hold_the_transcribers_text(service, transcriber):
    for audio in [SHORTEST_FIRST[0].read_bytes(), write(speech(16_000, seconds=35.0, channels=1), 16_000, "FLAC")]:
        text = transcriber.transcribe(audio).text
        assert service.ask(audio).json()["text"] == text
        plain = service.ask(audio, response_format="text", language="en", temperature="0", stream="false")
        assert plain.text == text + "\n"
        assert plain.headers["content-type"].startswith("text/plain")


def test_concurrent_requests_get_their_own_responses(service):
    uploads = [path.read_bytes() for path in SHORTEST_FIRST[:8]]
    alone = [service.ask(upload).json()["text"] for upload in uploads]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda upload: service.ask(upload).json()["text"], uploads))
    assert together == alone
    assert len(set(alone)) > 1


def test_health_and_models(service):
    assert service.get("/healthz").json() == {"status": "ok"}
    models = service.get("/v1/models").json()
    assert (models["object"], [model["id"] for model in models["data"]]) == ("list", ["tiny-graft"])


def test_too_long_audio_is_413(service):
    too_long = service.ask(noise_flac(MAX_DURATION_S + 1))
    message = f"over the limit of {MAX_DURATION_S} s"
    assert_error(too_long, 413, param="file", code="audio_too_long", message=message)


@pytest.mark.parametrize(
    ("audio", "message"),
    [(b"no audio at all", "not readable as audio"), (b"", "empty")],
    ids=["noise", "empty"],
)
def test_bad_audio_is_400(service, audio, message):
    assert_error(service.ask(audio), 400, param="file", code="invalid_audio", message=message)


@pytest.mark.parametrize(
    ("form", "param", "code", "message"),
    [
        (
            {"response_format": "docx"},
            "response_format",
            "unsupported_value",
            "'json', 'text', 'srt', 'vtt' or 'verbose_json'",
        ),
        ({"language": "de"}, "language", "unsupported_value", "the model transcribes 'en' only"),
        ({"temperature": "0.7", "strict": "true"}, "temperature", "unsupported_value", "decoding is greedy"),
        ({"stream": "true", "response_format": "srt"}, "stream", "unsupported_value", "response_format json"),
        (
            WORDS | {"response_format": "verbose_json"},
            "timestamp_granularities[]",
            "unsupported_value",
            "no aligner is loaded",
        ),
        ({"voice": "nova", "strict": "true"}, "voice", "unsupported_parameter", "not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_unsupported_fields_are_400(service, form, param, code, message):
    assert_error(service.ask(SHORT_NOISE, **form), 400, param=param, code=code, message=message)


def test_hints_that_cannot_be_honoured_are_named(service):
    response = service.ask(SHORT_NOISE, temperature="0.7", voice="nova", language="en-US")
    assert (response.status_code, response.headers["X-Graft-Ignored"]) == (200, "voice, temperature")


def test_what_is_missing_or_unknown(service):
    endpoint = f"{service.url}/v1/audio/transcriptions"
    asking = {"headers": AUTHORIZED, "timeout": 10}
    no_file = requests.post(endpoint, files={"model": (None, "tiny-graft")}, **asking)
    assert_error(no_file, 400, param="file", code="missing_required_parameter", message="'file' is missing")
    no_form = requests.post(endpoint, json={"model": "tiny-graft"}, **asking)
    message = "'input_audio' is missing"
    assert_error(no_form, 400, param="input_audio", code="missing_required_parameter", message=message)
    other_model = service.ask(SHORT_NOISE, model="whisper-1")
    assert_error(other_model, 404, param="model", code="model_not_found", message="use 'tiny-graft'")
    assert_error(service.get("/v1/nothing"), 404, param=None, code=None, message="Not Found")
    assert_error(requests.get(endpoint, **asking), 405, param=None, code=None, message="Method Not Allowed")


def test_too_large_an_upload_is_413_announced_or_not(service):
    message = f"over the limit of {MAX_UPLOAD_BYTES} bytes"
    upload = os.urandom(MAX_UPLOAD_BYTES + 1000)
    assert_error(service.ask(upload), 413, param=None, code="upload_too_large", message=message)
    parts = [b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.flac"\r\n\r\n', upload, b"\r\n--x--\r\n"]
    chunked = requests.post(
        f"{service.url}/v1/audio/transcriptions",
        data=iter(parts),
        headers=AUTHORIZED | {"content-type": "multipart/form-data; boundary=x"},
        timeout=60,
    )
    assert_error(chunked, 413, param=None, code="upload_too_large", message=message)


@pytest.mark.processes
def test_an_ingress_imports_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, serve.app; sys.exit('torch' in sys.modules)"], check=True)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValidationError, match="modle"):
        ServeArgs(model="m", modle="x")
    with pytest.raises(ModelError, match="config\\.json"):
        build(ServeArgs(model=str(tmp_path)))
    config = yaml.safe_load((ROOT / "serve" / "serve.yaml").read_text())
    ServeArgs(**config["applications"][0]["args"])
