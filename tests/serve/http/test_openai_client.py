"""The service through the official `openai` client, which must not notice that it is not OpenAI's."""

import asyncio
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
import soundfile

from graft.audio.clip import read_audio
from graft.inference.subtitles import format_transcript
from graft.inference.transcriber import Transcriber, open_transcriber
from jobs.common.cluster import connect
from jobs.common.local_service import free_port
from serve.app import build
from serve.config import ServeArgs
from tests.support import tiny_models
from tests.support.media import SHORTEST_FIRST

KEY = "sk-test-of-the-service"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_tiny_graft(
        tmp_path_factory.mktemp("serve") / "tiny-graft", trained_styles=["formatted"], trained_context=True
    )


@pytest.fixture(scope="module")
def transcriber(folder) -> Iterator[Transcriber]:
    opened = open_transcriber(folder)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory) -> Iterator[str]:
    from ray import serve

    keys = tmp_path_factory.mktemp("keys")
    (keys / "keys").write_text(f"another\n{KEY}\n")
    connect()
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 60})
    with contextlib.chdir(keys):  # replicas are elsewhere
        application = build(ServeArgs(model=str(folder), key_file="keys"))
    serve.run(application, name="openai", route_prefix="/asr")
    yield f"http://127.0.0.1:{port}/asr/v1"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)


def two_chunks() -> io.BytesIO:
    """Speech, a long pause, and speech again."""
    one, two = (soundfile.read(path, dtype="float32")[0] for path in SHORTEST_FIRST[5:7])
    file = io.BytesIO()
    soundfile.write(file, np.concatenate([one, np.zeros(4 * 16_000, np.float32), two]), 16_000, format="wav")
    file.name = "two.wav"
    file.seek(0)
    return file


def test_every_format_holds_what_the_transcriber_says(client, transcriber):
    audio = two_chunks()
    expected = transcriber.transcribe(audio.getvalue())
    assert len(expected.segments) == 2

    def ask(**options):
        return client.audio.transcriptions.create(file=("two.wav", audio.getvalue()), model="tiny-graft", **options)

    assert ask().text == expected.text
    assert ask(response_format="text") == expected.text + "\n"
    assert ask(response_format="srt") == format_transcript(expected, "srt")
    assert ask(response_format="vtt") == format_transcript(expected, "vtt")
    told = ask(response_format="verbose_json", timestamp_granularities=["segment"], language="en", temperature=0)
    assert (told.text, told.language, told.duration) == (expected.text, "en", expected.duration_s)
    for part, segment in zip(told.segments, expected.segments, strict=True):
        assert (part.start, part.end, part.text, part.flags) == (
            segment.start_s,
            segment.end_s,
            segment.text,
            list(segment.flags),
        )
        assert part.avg_logprob == pytest.approx(segment.mean_logprob, abs=1e-5)


def test_a_stream_ends_with_its_parts_joined(client, transcriber):
    audio = two_chunks()

    async def whole() -> str:
        parts = []
        for chunk in transcriber._cut(read_audio(audio.getvalue())):
            parts.append("".join([part async for part in transcriber.stream_chunk(chunk) if isinstance(part, str)]))
        return " ".join(parts)

    events = list(
        client.audio.transcriptions.create(file=("two.wav", audio.getvalue()), model="tiny-graft", stream=True)
    )
    deltas = [event.delta for event in events[:-1]]
    assert {event.type for event in events[:-1]} == {"transcript.text.delta"}
    assert len(deltas) > 4
    assert events[-1].type == "transcript.text.done"
    assert "".join(deltas) == events[-1].text == asyncio.run(whole())


def test_words_that_may_occur_change_the_answer_and_never_stand_in_it(client, transcriber):
    words = ["Aachen", "New York"]
    plain = client.audio.transcriptions.create(file=SHORTEST_FIRST[3], model="tiny-graft").text
    told = client.audio.transcriptions.create(file=SHORTEST_FIRST[3], model="tiny-graft", prompt=", ".join(words)).text
    assert told == transcriber.transcribe(SHORTEST_FIRST[3], context=words).text != plain
    assert not any(word in told for word in words)


def test_words_may_come_as_keywords(client, transcriber):
    words = ["Aachen", "New York"]
    told = client.audio.transcriptions.create(file=SHORTEST_FIRST[3], model="tiny-graft", keywords=words)
    assert told.text == transcriber.transcribe(SHORTEST_FIRST[3], context=words).text


def test_the_asynchronous_client_asks_and_streams(url, transcriber):
    async def ask() -> tuple[list[str], str, str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            asked = [client.audio.transcriptions.create(file=path, model="tiny-graft") for path in SHORTEST_FIRST[:4]]
            texts = [answer.text for answer in await asyncio.gather(*asked)]
            deltas, done = "", ""
            async for event in await client.audio.transcriptions.create(
                file=SHORTEST_FIRST[3], model="tiny-graft", stream=True
            ):
                if event.type == "transcript.text.delta":
                    deltas += event.delta
                else:
                    done += event.text
            return texts, deltas, done

    texts, deltas, done = asyncio.run(ask())
    assert texts == [transcriber.transcribe(path).text for path in SHORTEST_FIRST[:4]]
    assert deltas == done != ""


def test_answers_tell_their_request_and_usage(client, transcriber):
    raw = client.audio.transcriptions.with_raw_response.create(
        file=SHORTEST_FIRST[3], model="tiny-graft", extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    seconds = transcriber.transcribe(SHORTEST_FIRST[3]).duration_s
    assert (raw.parse().usage.type, raw.parse().usage.seconds) == ("duration", seconds)
    verbose = client.audio.transcriptions.create(
        file=SHORTEST_FIRST[3], model="tiny-graft", response_format="verbose_json"
    )
    assert verbose.usage.seconds == seconds


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"include": ["logprobs"]}, "include[]"),
        ({"chunking_strategy": {"type": "server_vad"}}, "chunking_strategy[type]"),
        ({"temperature": 0.5}, "temperature"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"response_format": "verbose_json", "timestamp_granularities": ["word"]}, "timestamp_granularities[]"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_done_is_a_bad_request(client, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.audio.transcriptions.create(file=SHORTEST_FIRST[0], model="tiny-graft", **options)
    assert refused.value.param == param


def test_what_is_too_large_or_elsewhere_is_told(client):
    with pytest.raises(openai.APIStatusError) as large:
        client.audio.transcriptions.create(file=("a.wav", bytes(60_000_000)), model="tiny-graft")
    assert (large.value.status_code, large.value.code) == (413, "upload_too_large")
    with pytest.raises(openai.NotFoundError) as elsewhere:
        client.audio.translations.create(file=SHORTEST_FIRST[0], model="tiny-graft")
    assert elsewhere.value.type == "invalid_request_error"


def test_errors_are_the_clients_own(client, url):
    def ask(key=KEY, **options):
        one = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        return one.audio.transcriptions.create(**{"file": SHORTEST_FIRST[0], "model": "tiny-graft"} | options)

    with pytest.raises(openai.AuthenticationError) as unknown:
        ask(key="sk-unknown")
    assert unknown.value.body["type"] == "authentication_error"
    assert "sk-unknown" not in str(unknown.value)
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="whisper-1")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(language="de")
    assert (refused.value.param, refused.value.code) == ("language", "unsupported_value")
    with pytest.raises(openai.BadRequestError) as broken:
        ask(file=("a.wav", b"no audio"))
    assert broken.value.code == "invalid_audio"
    with pytest.raises(openai.BadRequestError) as early:
        ask(file=("a.wav", b"no audio"), stream=True)
    assert early.value.code == "invalid_audio"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny-graft"]
    assert client.models.retrieve("tiny-graft").owned_by == "graft"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("whisper-1")
