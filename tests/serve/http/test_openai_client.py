"""The service through the official `openai` client, for which it must behave as OpenAI's service does."""

import asyncio
import base64
import io
import os
import subprocess
import sys

import numpy as np
import openai
import pytest
import soundfile

from graft.audio.clip import read_audio
from tests.support.media import SHORTEST_FIRST
from tests.support.paths import ROOT

pytestmark = pytest.mark.xdist_group("serve")

CLIP = SHORTEST_FIRST[3]
MODEL = "tiny-graft"


@pytest.fixture(scope="module")
def client(service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.key, max_retries=0)


def two_chunks() -> bytes:
    """Speech, a long pause, and speech again, as a WAV file."""
    one, two = (soundfile.read(path, dtype="float32")[0] for path in SHORTEST_FIRST[5:7])
    file = io.BytesIO()
    soundfile.write(file, np.concatenate([one, np.zeros(4 * 16_000, np.float32), two]), 16_000, format="wav")
    return file.getvalue()


def test_every_format_holds_the_transcribers_result(client, transcriber):
    audio = two_chunks()
    expected = transcriber.transcribe(audio)
    assert len(expected.segments) == 2

    def ask(**options):
        return client.audio.transcriptions.create(file=("two.wav", audio), model=MODEL, **options)

    assert ask().text == expected.text
    assert ask(response_format="text") == expected.text + "\n"
    assert ask(response_format="srt") == expected.to_string("srt")
    assert ask(response_format="vtt") == expected.to_string("vtt")
    verbose = ask(response_format="verbose_json", timestamp_granularities=["segment"], language="en", temperature=0)
    assert (verbose.text, verbose.language, verbose.duration) == (expected.text, "en", expected.duration_s)
    for part, segment in zip(verbose.segments, expected.segments, strict=True):
        assert (part.start, part.end, part.text) == (segment.start_s, segment.end_s, segment.text)
        assert part.flags == list(segment.flags)
        assert part.avg_logprob == pytest.approx(segment.mean_logprob, abs=1e-5)


@pytest.mark.processes
def test_the_example_prints_text_and_subtitles(service, transcriber):
    environment = os.environ | {"OPENAI_BASE_URL": f"{service.url}/v1", "OPENAI_API_KEY": service.key}
    command = [sys.executable, ROOT / "examples" / "openai_client.py", CLIP]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    transcript = transcriber.transcribe(CLIP)
    assert shown == f"{CLIP.name}: {transcript.text}\n{transcript.to_string('srt')}\n"


def test_a_stream_ends_with_its_deltas_joined(client, transcriber):
    audio = two_chunks()

    async def stream_all() -> str:
        texts = []
        for chunk in transcriber._chunker(read_audio(audio)):
            texts.append("".join([part async for part in transcriber.stream_chunk(chunk) if isinstance(part, str)]))
        return " ".join(texts)

    events = list(client.audio.transcriptions.create(file=("two.wav", audio), model=MODEL, stream=True))
    deltas = [event.delta for event in events[:-1]]
    assert {event.type for event in events[:-1]} == {"transcript.text.delta"}
    assert len(deltas) > 4
    assert events[-1].type == "transcript.text.done"
    assert "".join(deltas) == events[-1].text == asyncio.run(stream_all())
    usage = events[-1].usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens > usage.input_tokens > 0


def test_log_probabilities_of_tokens_are_included(client, transcriber):
    audio = two_chunks()
    asked = {"file": ("two.wav", audio), "model": MODEL, "include": ["logprobs"]}
    response = client.audio.transcriptions.create(**asked)
    assert all(token.logprob <= 0 and token.bytes for token in response.logprobs)
    assert len(response.logprobs) > 10
    *deltas, done = client.audio.transcriptions.create(**asked, stream=True)
    streamed = [token for delta in deltas for token in delta.logprobs]
    assert [token.token for token in streamed] == [token.token for token in done.logprobs]
    assert [token.token for token in streamed] == [token.token for token in response.logprobs]


def test_context_words_change_the_text_and_do_not_appear_in_it(client, transcriber):
    words = ["Aachen", "New York"]
    plain = client.audio.transcriptions.create(file=CLIP, model=MODEL).text
    prompted = client.audio.transcriptions.create(file=CLIP, model=MODEL, prompt=", ".join(words)).text
    assert prompted == transcriber.transcribe(CLIP, context=words).text != plain
    assert not any(word in prompted for word in words)


def test_context_words_may_come_as_keywords(client, transcriber):
    words = ["Aachen", "New York"]
    response = client.audio.transcriptions.create(file=CLIP, model=MODEL, keywords=words)
    assert response.text == transcriber.transcribe(CLIP, context=words).text


def test_the_asynchronous_client_sends_and_streams(service, transcriber):
    async def ask() -> tuple[list[str], str, str]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key, max_retries=0) as client:
            requests = [client.audio.transcriptions.create(file=path, model=MODEL) for path in SHORTEST_FIRST[:4]]
            texts = [response.text for response in await asyncio.gather(*requests)]
            deltas, done = "", ""
            async for event in await client.audio.transcriptions.create(file=CLIP, model=MODEL, stream=True):
                if event.type == "transcript.text.delta":
                    deltas += event.delta
                else:
                    done += event.text
            return texts, deltas, done

    texts, deltas, done = asyncio.run(ask())
    assert texts == [transcriber.transcribe(path).text for path in SHORTEST_FIRST[:4]]
    assert deltas == done != ""


def test_responses_name_their_request_and_usage(client, transcriber):
    raw = client.audio.transcriptions.with_raw_response.create(
        file=CLIP, model=MODEL, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    seconds = transcriber.transcribe(CLIP).duration_s
    assert (raw.parse().usage.type, raw.parse().usage.seconds) == ("duration", seconds)
    verbose = client.audio.transcriptions.create(file=CLIP, model=MODEL, response_format="verbose_json")
    assert verbose.usage.seconds == seconds


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": "diarized_json"}, "response_format"),
        ({"language": "de"}, "language"),
        ({"temperature": 0.5, "extra_body": {"strict": True}}, "temperature"),
        ({"response_format": "verbose_json", "timestamp_granularities": ["word"]}, "timestamp_granularities[]"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_unsupported_options_are_bad_requests(client, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.audio.transcriptions.create(file=SHORTEST_FIRST[0], model=MODEL, **options)
    assert refused.value.param == param


def test_hints_are_ignored_and_named(client, transcriber):
    raw = client.audio.transcriptions.with_raw_response.create(
        file=CLIP,
        model=MODEL,
        language="en-US",
        languages=["en", "de"],
        temperature=0.2,
        chunking_strategy={"type": "server_vad", "threshold": 0.5},
        known_speaker_names=["agent"],
        extra_body={"vad_filter": True},
    )
    assert raw.parse().text == transcriber.transcribe(CLIP).text
    ignored = {"chunking_strategy", "known_speaker_names[]", "languages[]", "temperature", "vad_filter"}
    assert set(raw.headers["x-graft-ignored"].split(", ")) == ignored


def test_large_uploads_and_unknown_endpoints_are_refused(client):
    with pytest.raises(openai.APIStatusError) as large:
        client.audio.transcriptions.create(file=("a.wav", bytes(60_000_000)), model=MODEL)
    assert (large.value.status_code, large.value.code) == (413, "upload_too_large")
    with pytest.raises(openai.NotFoundError) as elsewhere:
        client.audio.translations.create(file=SHORTEST_FIRST[0], model=MODEL)
    assert elsewhere.value.type == "invalid_request_error"


def test_errors_have_the_clients_classes(service):
    def ask(key=service.key, **options):
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0)
        return client.audio.transcriptions.create(**{"file": SHORTEST_FIRST[0], "model": MODEL} | options)

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
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "graft"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("whisper-1")


def test_a_live_session_through_ray_serve_has_the_text_of_its_utterance(service, transcriber):
    speech = read_audio(SHORTEST_FIRST[20]).samples
    silence = np.zeros(16_000, np.float32)
    data = (np.concatenate([silence, speech, silence]) * 32767).astype("<i2").tobytes()

    async def run() -> list:
        events = []
        connecting = openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key).realtime.connect(
            model=MODEL, extra_query={"intent": "transcription"}
        )
        async with asyncio.timeout(120), connecting as live:
            settings = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
            await live.session.update(session={"type": "transcription", "audio": {"input": settings}})
            for start in range(0, len(data), 6_400):
                await live.input_audio_buffer.append(audio=base64.b64encode(data[start : start + 6_400]).decode())
            await live.input_audio_buffer.commit()
            async for event in live:
                events.append(event)
                if event.type.endswith((".completed", ".failed", "error")):
                    return events
        return events

    events = asyncio.run(run())
    last = events[-1]
    assert last.type == "conversation.item.input_audio_transcription.completed"
    assert "".join(event.delta for event in events if event.type.endswith(".delta")) == last.transcript
    assert last.usage.seconds == pytest.approx(len(data) / 32_000, abs=0.01)
