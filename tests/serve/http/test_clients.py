"""What other programs send, byte by byte, and the clients that a test can install, which needs a package registry.

The openai package for Python is in test_openai_client.py.
"""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import requests
import soundfile

from tests.support import media, tiny_models
from tests.support.http_service import open_backend, serve_api

KEY = "sk-of-a-client"
CLIP = media.SHORTEST_FIRST[0]
ALIASES = ("whisper-1", "gpt-4o-mini-transcribe")
HOME_ASSISTANT_PROMPT = "The following conversation is a smart home user talking to Home Assistant."

NODE = """
import fs from "node:fs";
import OpenAI, { toFile } from "openai";

const [url, apiKey, file] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey, maxRetries: 0 });
const transcriptions = client.audio.transcriptions;
const ask = async (options) =>
  transcriptions.create({ file: await toFile(fs.readFileSync(file), "a.flac"), model: "whisper-1", ...options });

const found = { events: [], errors: [] };
found.json = await ask({ include: ["logprobs"], temperature: 0.2, chunking_strategy: { type: "server_vad" } });
found.text = await ask({ response_format: "text" });
found.verbose = await ask({ response_format: "verbose_json", timestamp_granularities: ["segment"], language: "en" });
for await (const event of await ask({ stream: true, response_format: "text" })) found.events.push(event);
found.models = (await client.models.list()).data.map((model) => model.id);
for (const options of [{ language: "de" }, { response_format: "diarized_json" }, { model: "other" }])
  await ask(options).catch((error) => found.errors.push([error.constructor.name, error.status, error.param]));
const asked = { file: fs.createReadStream(file), model: "whisper-1", temperature: 0.2, vad_filter: true };
found.ignored = (await transcriptions.create(asked).withResponse()).response.headers.get("x-graft-ignored");
console.log(JSON.stringify(found));
"""
LITELLM = """
import asyncio, json, sys
import litellm, openai

url, key, file = sys.argv[1:]
target = {"model": "openai/whisper-1", "api_base": url, "api_key": key}

def ask(**options):
    with open(file, "rb") as audio:
        return litellm.transcription(file=audio, **target, **options)

async def ask_asynchronously():
    with open(file, "rb") as audio:
        return await litellm.atranscription(file=audio, **target)

found = {"json": ask(temperature=0.2, prompt="names", language="en").text}
found["verbose"] = ask(response_format="verbose_json", timestamp_granularities=["segment"]).model_dump()
found["asynchronous"] = asyncio.run(ask_asynchronously()).text
try:
    ask(language="de")
except openai.BadRequestError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def url(decoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service of a model that takes no lists of words, such as the small graft and Whisper."""
    with (
        open_backend(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("clients") / "tiny-graft")) as backend,
        serve_api(decoder, backend, keys=(KEY,), aliases=ALIASES) as address,
    ):
        yield address


def send(url: str, content_type: str, body: bytes) -> requests.Response:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": content_type}
    return requests.post(f"{url}/v1/audio/transcriptions", data=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def text(url: str) -> str:
    """The text of the clip."""
    files = {"file": ("a.flac", CLIP.read_bytes())}
    headers = {"Authorization": f"Bearer {KEY}"}
    asked = {"files": files, "data": {"model": "tiny-graft"}, "headers": headers}
    return requests.post(f"{url}/v1/audio/transcriptions", timeout=60, **asked).json()["text"]


def form(boundary: str, *parts: tuple[str, str | bytes]) -> bytes:
    """Write a form of parts, each with the lines of its head and its value."""
    written = [
        f"--{boundary}\r\n{head}\r\n\r\n".encode() + (value.encode() if isinstance(value, str) else value) + b"\r\n"
        for head, value in parts
    ]
    return b"".join(written) + f"--{boundary}--\r\n".encode()


def field(name: str) -> str:
    return f'Content-Disposition: form-data; name="{name}"'


def wav() -> bytes:
    """Return the clip as Home Assistant sends it: its samples with a header of the module `wave`."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
        written.writeframes(soundfile.read(CLIP, dtype="int16")[0].tobytes())
    return file.getvalue()


def aiohttp_field(name: str) -> str:
    return f"Content-Type: text/plain; charset=utf-8\r\n{field(name)}"


FLAC = CLIP.read_bytes()
OPEN_WEBUI_FILE = (f'{field("file")}; filename="2f1c6b0e.flac"', FLAC)
BODIES = {
    # client -> content type, body, and what is ignored of it
    "Home Assistant's OpenAI integration": (
        "multipart/form-data; boundary=0b2e8a5c3f",
        form(
            "0b2e8a5c3f",
            (field("model"), "gpt-4o-mini-transcribe"),
            (field("language"), "en"),
            (field("prompt"), HOME_ASSISTANT_PROMPT),
            (field("response_format"), "json"),
            (f'{field("file")}; filename="a.wav"\r\nContent-Type: audio/x-wav', wav()),
        ),
        "prompt",
    ),
    "Home Assistant's custom integration openai_stt": (
        "multipart/form-data; boundary=7d1f0c",
        form(
            "7d1f0c",
            (f'{field("file")}; filename="whisper_audio.wav"\r\nContent-Type: audio/wav', wav()),
            (field("model"), "whisper-1"),
            (field("language"), "en-US"),
            (field("prompt"), ""),
            (field("temperature"), "0"),
            (field("response_format"), "json"),
        ),
        None,
    ),
    "Home Assistant's custom integrations on aiohttp": (
        "multipart/form-data; boundary=c1a9d7e4b2",
        form(
            "c1a9d7e4b2",
            (f'Content-Type: audio/wav\r\n{field("file")}; filename="audio.wav"', wav()),
            (aiohttp_field("model"), "whisper-1"),
            (aiohttp_field("language"), "EN"),
            (aiohttp_field("prompt"), "Lights, blinds."),
            (aiohttp_field("temperature"), "0.2"),
        ),
        "temperature, prompt",
    ),
    "LangChain's OpenAIWhisperParser": (
        "multipart/form-data; boundary=e3b0c442",
        form(
            "e3b0c442",
            (field("model"), "whisper-1"),
            (f'{field("file")}; filename="meeting.mp3_part_0.mp3"\r\nContent-Type: audio/mpeg', FLAC),
        ),
        None,
    ),
    "LangChain's OpenAIWhisperParser with options": (
        "multipart/form-data; boundary=e3b0c443",
        form(
            "e3b0c443",
            (field("model"), "whisper-1"),
            (field("language"), "english"),
            (field("prompt"), "A meeting."),
            (field("response_format"), "json"),
            (field("temperature"), "0.5"),
            (f'{field("file")}; filename="part_0.mp3"\r\nContent-Type: audio/mpeg', FLAC),
        ),
        "temperature, prompt",
    ),
    "Open WebUI": (
        "multipart/form-data; boundary=5f2d",
        form("5f2d", (field("model"), "whisper-1"), (field("language"), "auto"), OPEN_WEBUI_FILE),
        None,
    ),
    "Open WebUI without a language": (
        "multipart/form-data; boundary=5f2e",
        form("5f2e", (field("model"), "whisper-1"), OPEN_WEBUI_FILE),
        None,
    ),
    "Open WebUI with the request format JSON": (
        "application/json",
        json.dumps(
            {"model": "whisper-1", "input_audio": {"data": base64.b64encode(FLAC).decode(), "format": "flac"}}
            | {"language": "en"}
        ).encode(),
        None,
    ),
    "vLLM's benchmark": (
        "multipart/form-data; boundary=a0b1",
        form(
            "a0b1",
            (field("model"), "whisper-1"),
            (field("temperature"), "0.0"),
            (field("max_completion_tokens"), "128"),
            (field("stream"), "False"),
            (field("language"), "en"),
            (field("stream_include_usage"), "True"),
            (field("stream_continuous_usage_stats"), "True"),
            (f'{field("file")}; filename="audio.wav"\r\nContent-Type: audio/wav', FLAC),
        ),
        "max_completion_tokens, stream_include_usage, stream_continuous_usage_stats",
    ),
}


@pytest.mark.parametrize("client", BODIES)
def test_what_clients_send_is_answered(url: str, text: str, client: str) -> None:
    content_type, body, ignored = BODIES[client]
    response = send(url, content_type, body)
    assert response.status_code == 200, response.text
    assert (response.json()["text"], response.headers.get("X-Graft-Ignored")) == (text, ignored)


def run(command: Sequence[str | Path], url: str, environment: dict[str, str], cwd: Path) -> dict:
    arguments = [*map(str, command), f"{url}/v1", KEY, str(CLIP)]
    ended = subprocess.run(
        arguments, env=os.environ | environment, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def install(command: Sequence[str | Path], cwd: Path) -> None:
    """Install a client; the test is skipped where that is not possible."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"there is no {command[0]}")
    installed = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=600)
    if installed.returncode:
        pytest.skip(f"{command[0]} cannot install it: {installed.stderr.strip().splitlines()[-1:]}")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_openai_for_node(url: str, text: str, tmp_path: Path) -> None:
    install(["npm", "install", "--no-audit", "--no-fund", "--silent", "openai"], tmp_path)
    (tmp_path / "ask.mjs").write_text(NODE)
    found = run(["node", tmp_path / "ask.mjs"], url, {}, tmp_path)
    assert found["json"]["text"] == found["verbose"]["text"] == text
    assert found["text"] == text + "\n"
    written = bytes(byte for token in found["json"]["logprobs"] for byte in token["bytes"]).decode(errors="replace")
    assert " ".join(written.split()) == text
    assert found["json"]["usage"]["type"] == "duration"
    *deltas, done = found["events"]
    assert {event["type"] for event in deltas} == {"transcript.text.delta"}
    assert "".join(event["delta"] for event in deltas) == done["text"] == text
    assert done["usage"]["total_tokens"] > len(found["json"]["logprobs"])
    assert found["models"] == ["tiny-graft", *ALIASES]
    assert found["errors"] == [
        ["BadRequestError", 400, "language"],
        ["BadRequestError", 400, "response_format"],
        ["NotFoundError", 404, "model"],
    ]
    assert found["ignored"] == "vad_filter, temperature"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_litellm(url: str, text: str, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    install([sys.executable, "-m", "pip", "install", "-q", "--target", packages, "litellm"], tmp_path)
    (tmp_path / "ask.py").write_text(LITELLM)
    # -S: what is installed beside graft may not suit it.
    environment = {"PYTHONPATH": str(packages), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    found = run([sys.executable, "-S", tmp_path / "ask.py"], url, environment, tmp_path)
    assert found["json"] == found["asynchronous"] == found["verbose"]["text"] == text
    assert found["verbose"]["segments"][0]["text"] == text
    assert "transcribes 'en' only" in found["error"]
