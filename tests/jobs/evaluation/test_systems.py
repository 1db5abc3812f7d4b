"""Test the systems that are compared with a graft: services over HTTP, and faster-whisper."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests
from fastapi import FastAPI, Request, Response
from pydantic import SecretStr

from graft.audio.chunking import Chunk, windows
from graft.audio.clip import AudioClip, read_audio
from graft.data.dataset import clip_row
from graft.errors import ModelError, RecipeError
from graft.inference.transcriber import open_transcriber
from jobs.common.cli import run_job
from jobs.evaluate import EvaluateRecipe
from jobs.evaluate import run as run_evaluate
from jobs.evaluation.system_spec import Service
from jobs.evaluation.systems import ServiceTranscriber, check_system, wav_bytes
from tests.support import media, tiny_models
from tests.support.http_service import open_backend, open_decoder, run_server, serve_api
from tests.support.jobs import left_by_evaluate
from tests.support.speech_corpus import BROKEN, corpus, row

KEY = "a-key-of-the-test"


def chunks(count: int = 2) -> list[Chunk]:
    return [Chunk(2.0 * place, read_audio(path)) for place, path in enumerate(media.SHORTEST_FIRST[:count])]


@contextmanager
def service(*answers: Response) -> Iterator[tuple[Service, list[bytes]]]:
    """Answer requests in turn, the last answer again and again; yields the service and the requests' bodies."""
    api, bodies = FastAPI(), list[bytes]()

    @api.post("/v1/audio/transcriptions")
    async def answer(request: Request) -> Response:
        bodies.append(await request.body())
        one = answers[min(len(bodies), len(answers)) - 1]
        return Response(one.body, one.status_code, dict(one.headers))

    with run_server(api) as url:
        yield Service(url=f"{url}/v1", model="m"), bodies


def said(text: str) -> Response:
    return Response(json.dumps({"text": text}), media_type="application/json")


def texts_of(one: Service, count: int = 2) -> list[str]:
    transcriber = ServiceTranscriber(one, None)
    return [segment.text for segment in asyncio.run(transcriber.transcribe_chunks(chunks(count), language="en"))]


@pytest.mark.seconds
def test_the_service_of_a_graft_answers_as_the_graft_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graft = tiny_models.save_tiny_graft(tmp_path / "graft")
    with open_decoder() as decoder, open_backend(graft) as backend, serve_api(decoder, backend, keys=(KEY,)) as url:
        with pytest.raises(ModelError, match=r"does not take the key \(status 401\)") as caught:
            check_system(Service(url=f"{url}/v1", model="graft"))
        assert "\n" not in str(caught.value)
        with pytest.raises(RecipeError, match="api_key_env=NO_SUCH_KEY: that environment variable is not set"):
            check_system(Service(url=f"{url}/v1", model="graft", api_key_env="NO_SUCH_KEY"))
        monkeypatch.setenv("KEY_OF_TEST", KEY)
        model = requests.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()["data"][0]["id"]
        spec = Service(url=f"{url}/v1", model=model, api_key_env="KEY_OF_TEST")
        assert check_system(spec) == "service"
        transcriber = ServiceTranscriber(spec, SecretStr(KEY))
        found = asyncio.run(transcriber.transcribe_chunks(chunks()))
        refused = ServiceTranscriber(spec, SecretStr("another"))
        with pytest.raises(ModelError, match=r"refuses requests \(status 401") as caught:
            asyncio.run(refused.transcribe_chunks(chunks()))
        assert "another" not in str(caught.value)
    own = open_transcriber(graft)
    clips = [AudioClip(np.round(one.clip.samples * 32767) / 32768) for one in chunks()]
    assert [one.text for one in found] == [own.transcribe(clip).text for clip in clips]
    own.close()
    assert [(one.start_s, one.end_s) for one in found] == [
        (one.start_s, one.start_s + one.clip.duration_s) for one in chunks()
    ]


def test_requests_are_made_again_while_the_service_is_busy() -> None:
    busy = Response("busy", 429, {"retry-after": "0"})
    with service(busy, Response("down", 503), said("hello")) as (one, bodies):
        assert texts_of(one, 1) == ["hello"]
    assert len(bodies) == 3
    assert b"RIFF" in bodies[-1]
    assert b'name="language"' in bodies[-1]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (Response("no such model", 404), ModelError, r"refuses requests \(status 404: no such model\): correct url"),
        (Response("<html>hello</html>", media_type="text/html"), ModelError, "answers with text/html"),
        (said("x") and Response("[]", media_type="application/json"), ModelError, "in place of JSON with a text"),
        (Response("too\nshort", 400), RuntimeError, r"gives no text \(status 400: too short\)"),
    ],
)
def test_a_wrong_address_ends_the_run_and_a_clip_that_is_refused_does_not(
    answer: Response, error: type[Exception], words: str
) -> None:
    with service(answer) as (one, _), pytest.raises(error, match=words) as caught:
        texts_of(one, 1)
    assert "\n" not in str(caught.value)


def test_a_service_that_refuses_everything_ends_the_run() -> None:
    with service(Response("out of memory", 400)) as (one, _):
        one = one.model_copy(update={"concurrency": 1})
        transcriber = ServiceTranscriber(one, None)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                transcriber._transcribe(chunks(1)[0], None)
        with pytest.raises(ModelError, match="the same command goes on when it does"):
            transcriber._transcribe(chunks(1)[0], None)


def test_systems_that_do_not_work_are_refused_in_a_line(tmp_path: Path) -> None:
    for spec, words in [
        (Service(url="http://127.0.0.1:9/v1?key=hidden", model="m"), "cannot be reached"),
        (Service(url="nonsense", model="m"), "cannot be reached"),
        ("http://somebody:hidden@host/v1", r"is an address: give a service as \{url: http://host/v1, model: NAME\}"),
        (str(tmp_path / "nothing"), "nothing"),
        (
            "faster-whisper:nope",
            "is no Whisper in CTranslate2's format: give a folder with model.bin, a hub id, or a size",
        ),
    ]:
        with pytest.raises((ModelError, RecipeError), match=words) as caught:
            check_system(spec)
        assert "\n" not in str(caught.value)
        assert "hidden" not in str(caught.value)


def test_samples_survive_the_wav_file() -> None:
    samples = np.array([0, 0.5, -1, 1, 2], np.float32)
    read = read_audio(wav_bytes(samples)).samples
    np.testing.assert_allclose(read, [0, 0.5, -1, 1, 1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.bundled
@pytest.mark.timeout(900)
def test_a_service_and_faster_whisper_are_scored_beside_a_stage_and_whisper(
    tmp_path: Path, ray_started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """faster-whisper decodes with beams, and so writes nearly what the same weights write greedily."""
    pytest.importorskip("faster_whisper")
    from jobs.benchmarks.peers import convert_whisper

    assert convert_whisper(str(tmp_path / "converted"))
    graft = tiny_models.save_tiny_graft(tmp_path / "graft")
    rows = [clip_row(path.stem, read_audio(path), path.stem) for path in media.SHORTEST_FIRST[:3]]
    data = corpus(tmp_path / "test.parquet", [*rows, row("broken", 9, **BROKEN)])
    monkeypatch.setenv("KEY_OF_TEST", KEY)
    with open_decoder() as decoder, open_backend(graft) as backend, serve_api(decoder, backend, keys=(KEY,)) as url:
        model = requests.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()["data"][0]["id"]
        api = f"{{url: {url}/v1, model: {model}, api_key_env: KEY_OF_TEST}}"
        given = [
            f"model={graft}",
            f"data.test={data}",
            f"out={tmp_path / 'out'}",
            "windows=true",
            "dtype=fp32",
            "checks=0",
        ]
        systems = [f"systems.api={api}", f"systems.fw=faster-whisper:{tmp_path / 'converted'}"]
        assert run_job(EvaluateRecipe, run_evaluate, summary="", argv=[*given, *systems]) == 0
    report, clips = left_by_evaluate(tmp_path / "out")
    found = report["sets"]["test"]["systems"]
    assert found.keys() == {"graft", "whisper", "api", "fw"}
    assert all(one["failed"].keys() == {"broken"} for one in found.values())
    assert found["fw"]["wer"] <= found["whisper"]["wer"] + 0.2
    assert KEY not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.[jy]*"))
    for name, chunker in (("graft", windows), ("api", None)):  # the service finds the speech in what it gets itself
        own = open_transcriber(graft, chunker=chunker)
        assert [one[name] for one in clips[:3]] == [own.transcribe(one["wav"]["bytes"]).text for one in rows]
        own.close()
