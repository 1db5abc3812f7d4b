"""The real server on loopback, asked by a real HTTP client."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import soundfile
import yaml
from pydantic import ValidationError

from graft.errors import ModelError
from graft.inference.transcriber import open_transcriber
from jobs.common.cluster import connect
from jobs.common.local_service import free_port
from serve.app import build
from serve.config import ServeArgs
from serve.decode.decoder import DecodeArgs
from serve.http.auth import VARIABLE
from tests.support import tiny_models
from tests.support.media import SHORTEST_FIRST, speech, write
from tests.support.paths import ROOT
from tests.support.ray_service import replica_logs

MAX_UPLOAD = 3_000_000
WORDS = {"timestamp_granularities[]": "word"}


def flac(seconds: float, seed: int = 0) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(seed).standard_normal(int(seconds * 16_000)) * 0.1
    soundfile.write(file, samples.astype(np.float32), 16_000, format="flac")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("serve") / "tiny-graft")


@pytest.fixture(scope="module")
def url(folder):
    from ray import serve

    connect()
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 60})
    serve.run(
        build(ServeArgs(model=str(folder), max_upload_bytes=MAX_UPLOAD, decode=DecodeArgs(max_duration_s=40))),
        name="test",
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def post(url, data=None, *, file=None, **options) -> requests.Response:
    files = {"file": ("a.flac", flac(0.5) if file is None else file)}
    return requests.post(
        f"{url}/v1/audio/transcriptions",
        files=files,
        data={"model": "tiny-graft"} | (data or {}),
        timeout=60,
        **options,
    )


def test_keys_of_the_process_that_builds_hold_on_a_ray_that_was_there(url, folder, monkeypatch):
    """As by `GRAFT_API_KEYS=... serve run serve.app:build` against a running cluster, whose workers know nothing of it."""
    from ray import serve

    monkeypatch.setenv(VARIABLE, "sk-mine")
    serve.run(build(ServeArgs(model=str(folder))), name="keyed", route_prefix="/keyed")
    try:
        answers = [
            post(f"{url}/keyed", headers=headers).status_code for headers in ({}, {"Authorization": "Bearer sk-mine"})
        ]
    finally:
        serve.delete("keyed")
    assert answers == [401, 200]
    warned = {
        record["deployment"]
        for record in replica_logs()
        if record["message"] == "no API keys were given: everyone may ask"
    }
    assert warned == {"test_Ingress"}


def assert_fault(response, status, *, param, code, message) -> None:
    assert response.status_code == status
    fault = response.json()["error"]
    assert (fault["param"], fault["code"], fault["type"]) == (param, code, "invalid_request_error")
    assert message in fault["message"]
    assert not any(word in response.text for word in ("Traceback", "/", "\\n")), response.text


def test_answers_are_the_transcribers_own(url, folder):
    transcriber = open_transcriber(folder)
    for audio in [SHORTEST_FIRST[0].read_bytes(), write(speech(16_000, seconds=35.0, channels=1), 16_000, "FLAC")]:
        text = transcriber.transcribe(audio).text
        assert post(url, file=audio).json()["text"] == text
        plain = post(
            url, {"response_format": "text", "language": "en", "temperature": "0", "stream": "false"}, file=audio
        )
        assert plain.text == text + "\n"
        assert plain.headers["content-type"].startswith("text/plain")
    transcriber.close()


def test_concurrent_requests_get_their_own_answers(url):
    uploads = [path.read_bytes() for path in SHORTEST_FIRST[:8]]
    alone = [post(url, file=upload).json()["text"] for upload in uploads]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda upload: post(url, file=upload).json()["text"], uploads))
    assert together == alone
    assert len(set(alone)) > 1


def test_health_and_models(url):
    assert requests.get(f"{url}/healthz", timeout=10).json() == {"status": "ok"}
    models = requests.get(f"{url}/v1/models", timeout=10).json()
    assert (models["object"], [model["id"] for model in models["data"]]) == ("list", ["tiny-graft"])


def test_too_long_is_413(url):
    assert_fault(post(url, file=flac(41)), 413, param="file", code="audio_too_long", message="over the limit of 40 s")


@pytest.mark.parametrize(
    ("file", "message"),
    [(b"no audio at all", "not readable as audio"), (b"", "empty")],
    ids=["noise", "empty"],
)
def test_bad_audio_is_400(url, file, message):
    assert_fault(post(url, file=file), 400, param="file", code="invalid_audio", message=message)


@pytest.mark.parametrize(
    ("data", "param", "code", "message"),
    [
        (
            {"response_format": "docx"},
            "response_format",
            "unsupported_value",
            "'json', 'text', 'srt', 'vtt' or 'verbose_json'",
        ),
        ({"language": "de"}, "language", "unsupported_value", "the model writes 'en' only"),
        ({"temperature": "0.7"}, "temperature", "unsupported_value", "decoding is greedy"),
        ({"stream": "true", "response_format": "srt"}, "stream", "unsupported_value", "response_format json"),
        ({"prompt": "names"}, "prompt", "unsupported_parameter", "not trained for lists of words"),
        (
            WORDS | {"response_format": "verbose_json"},
            "timestamp_granularities[]",
            "unsupported_value",
            "no aligner is loaded",
        ),
        ({"voice": "nova"}, "voice", "unsupported_parameter", "not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_supported_is_400(url, data, param, code, message):
    assert_fault(post(url, data), 400, param=param, code=code, message=message)


def test_what_is_missing_or_unknown(url):
    endpoint = f"{url}/v1/audio/transcriptions"
    no_file = requests.post(endpoint, files={"model": (None, "tiny-graft")}, timeout=10)
    assert_fault(no_file, 400, param="file", code="missing_required_parameter", message="'file' is missing")
    no_form = requests.post(endpoint, json={"model": "tiny-graft"}, timeout=10)
    assert_fault(no_form, 400, param="file", code="missing_required_parameter", message="'file' is missing")
    assert_fault(
        post(url, {"model": "whisper-1"}), 404, param="model", code="model_not_found", message="'tiny-graft' does"
    )
    assert_fault(requests.get(f"{url}/v1/nothing", timeout=10), 404, param=None, code=None, message="Not Found")
    assert_fault(requests.get(endpoint, timeout=10), 405, param=None, code=None, message="Method Not Allowed")


def test_too_large_is_413_announced_or_not(url):
    upload = os.urandom(MAX_UPLOAD + 1000)
    assert_fault(post(url, file=upload), 413, param=None, code="upload_too_large", message=f"over {MAX_UPLOAD} bytes")
    parts = [b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.flac"\r\n\r\n', upload, b"\r\n--x--\r\n"]
    chunked = requests.post(
        f"{url}/v1/audio/transcriptions",
        data=iter(parts),
        headers={"content-type": "multipart/form-data; boundary=x"},
        timeout=60,
    )
    assert_fault(chunked, 413, param=None, code="upload_too_large", message=f"over {MAX_UPLOAD} bytes")


def test_an_ingress_comes_without_torch():
    subprocess.run([sys.executable, "-c", "import sys, serve.app; sys.exit('torch' in sys.modules)"], check=True)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValidationError, match="modle"):
        ServeArgs(model="m", modle="x")
    with pytest.raises(ModelError, match="config\\.json"):
        build(ServeArgs(model=str(tmp_path)))
    config = yaml.safe_load((ROOT / "serve" / "serve.yaml").read_text())
    ServeArgs(**config["applications"][0]["args"])
