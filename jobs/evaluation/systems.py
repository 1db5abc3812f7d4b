"""Open the systems that are compared: grafts and Whispers, faster-whisper, and OpenAI-compatible services.

All transcribe the same chunks, which the pipeline cuts, so that they differ by what they make of them alone.
"""

import asyncio
import functools
import io
import json
import os
import re
import threading
import time
import wave
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import SecretStr

from graft.audio.chunking import Chunk
from graft.audio.clip import SAMPLE_RATE
from graft.errors import ModelError, OutputError, RecipeError, require
from graft.inference.segments import Segment
from graft.redaction import without_secrets
from graft.storage.atomic import write_atomic
from graft.storage.locations import one_line_error

from ..transcription.pipeline import Opener, model_opener
from ..transcription.reader import FAULTS_IN_A_ROW
from .system_spec import FASTER_WHISPER, Service, SystemSpec, is_checkpoint

Kind = Literal["graft", "whisper", "faster-whisper", "service"]
ATTEMPTS = 4
"""Requests of a chunk to a service, at most."""
FIRST_WAIT_S, MOST_WAIT_S = 0.5, 30.0
"""Seconds before the second attempt, which double for each further one, and the most that a service can ask for."""
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which a request is made again."""
SETTINGS_FAULTS = (401, 403, 404, 405)
"""Statuses that say that the address or the key is wrong, for all requests."""
COMPUTE_TYPES = {None: "default", "fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
"""CTranslate2's names of precisions."""


def check_system(spec: SystemSpec) -> Kind:
    """Return the kind of a system. Raises ModelError for none that works, MissingExtra and RecipeError."""
    if isinstance(spec, Service):
        _check_service(spec)
        return "service"
    if not is_checkpoint(spec):
        _check_faster_whisper(spec.removeprefix(FASTER_WHISPER))
        return "faster-whisper"
    if "://" in spec and not spec.startswith("hf://"):
        raise RecipeError(
            f"{without_secrets(spec)} is an address: give a service as {{url: {without_secrets(spec)}, model: NAME}}"
        )
    from graft.checkpoints.loading import check_model

    return check_model(spec)


def keep_digests(specs: Mapping[str, SystemSpec], path: Path) -> None:
    """Write the digests of the systems' weights to a file, by name.

    Raises OutputError where the file has others: the answers beside it are not of these systems.
    """
    from graft.checkpoints.loading import model_digest

    digests = {name: model_digest(spec) for name, spec in specs.items() if is_checkpoint(spec)}
    before = json.loads(path.read_text()) if path.is_file() else digests
    if changed := [name for name, digest in digests.items() if before.get(name) != digest]:
        raise OutputError(
            f"output {path.parent} has answers of another {changed[0]}, whose weights have changed since: "
            "choose another out="
        )
    write_atomic(path, json.dumps(digests, indent=2) + "\n")


def system_opener(spec: SystemSpec, *, threads: int, gpu: bool, dtype: str | None) -> Opener:
    """Return a function that opens a system in a worker. Raises RecipeError without a service's key."""
    if isinstance(spec, Service):
        return functools.partial(ServiceTranscriber, spec, _api_key(spec))
    if not is_checkpoint(spec):
        name = spec.removeprefix(FASTER_WHISPER)
        name = str(Path(name).absolute()) if Path(name).is_dir() else name
        return functools.partial(FasterWhisperTranscriber, name, threads=threads, gpu=gpu, dtype=dtype)
    return model_opener(spec, threads=threads, gpu=gpu, dtype=dtype)


class FasterWhisperTranscriber:
    """Whisper as faster-whisper decodes it by default, beams and fallback included: chunks -> segments.

    `name` is a folder in CTranslate2's format or a size, such as small, which is downloaded.
    """

    def __init__(self, name: str, *, threads: int, gpu: bool, dtype: str | None) -> None:
        from faster_whisper import WhisperModel

        settings: dict[str, Any] = {"device": "cuda" if gpu else "cpu", "compute_type": COMPUTE_TYPES[dtype]}
        try:
            self._model = WhisperModel(name, cpu_threads=threads, **settings)
        except Exception as error:
            raise ModelError(f"{FASTER_WHISPER}{name} cannot be opened: {one_line_error(error)}") from error
        self._turn = threading.Lock()

    async def find_language(self, chunks: Sequence[Chunk]) -> str | None:
        """Leave the language to Whisper, which finds out that of each chunk."""
        return None

    async def transcribe_chunks(self, chunks: Sequence[Chunk], *, language: str | None = None) -> list[Segment]:
        """Transcribe chunks one after the other; a segment for each, in their order."""
        return await asyncio.to_thread(lambda: [self._transcribe(chunk, language) for chunk in chunks])

    def _transcribe(self, chunk: Chunk, language: str | None) -> Segment:
        with self._turn:
            parts = list(self._model.transcribe(chunk.clip.samples, language=language)[0])
        lengths = [len(part.tokens) for part in parts]
        mean = float(np.average([part.avg_logprob for part in parts], weights=lengths)) if sum(lengths) else None
        return _segment(chunk, "".join(part.text for part in parts), mean)


class ServiceTranscriber:
    """A service behind OpenAI's POST /audio/transcriptions, to which each chunk goes as a WAV file: chunks -> segments.

    Requests are made again where the service is busy or the connection fails. Raises RuntimeError for a chunk that has
    no text after all attempts, and ModelError where several in a row have none, or the address or the key is wrong.
    """

    def __init__(self, service: Service, api_key: SecretStr | None) -> None:
        self._service, self._headers = service, _headers(api_key)
        self._faults = 0  # chunks in a row that got no text
        self._pool = ThreadPoolExecutor(service.concurrency, thread_name_prefix="graft-service")

    async def find_language(self, chunks: Sequence[Chunk]) -> str | None:
        """Leave the language to the service."""
        return None

    async def transcribe_chunks(self, chunks: Sequence[Chunk], *, language: str | None = None) -> list[Segment]:
        """Transcribe chunks at the same time; a segment for each, in their order."""
        tasks = [asyncio.wrap_future(self._pool.submit(self._transcribe, chunk, language)) for chunk in chunks]
        return list(await asyncio.gather(*tasks))

    def _transcribe(self, chunk: Chunk, language: str | None) -> Segment:
        form = {"model": self._service.model, "response_format": "json", "temperature": "0"}
        form |= {"language": language} if language else {}
        try:
            text = self._text_of(form, wav_bytes(chunk.clip.samples))
        except RuntimeError as error:
            self._faults += 1
            if self._faults > FAULTS_IN_A_ROW:
                raise ModelError(f"{error}: the same command goes on when it does") from error
            raise
        self._faults = 0
        return _segment(chunk, text)

    def _text_of(self, form: dict[str, str], wav: bytes) -> str:
        """Ask for the text of an audio file, again where that may help."""
        import requests

        url = f"{self._service.url.rstrip('/')}/audio/transcriptions"
        wait_s, fault = FIRST_WAIT_S, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, MOST_WAIT_S)
            try:
                files = {"file": ("chunk.wav", wav, "audio/wav")}
                answer = requests.post(
                    url, data=form, files=files, headers=self._headers, timeout=self._service.timeout_s
                )
            except (requests.ConnectionError, requests.Timeout) as error:
                fault = type(error).__name__  # its text repeats the address, secrets included
                continue
            if answer.ok:
                return self._read_text(answer)
            fault = f"status {answer.status_code}: {' '.join(answer.text.split()):.200}"
            if answer.status_code in SETTINGS_FAULTS:
                raise ModelError(f"{self._name} refuses requests ({fault}): correct url, model or api_key_env")
            if answer.status_code not in TRANSIENT:
                break
            wait_s = min(max(wait_s, _retry_after(answer.headers.get("retry-after"))), MOST_WAIT_S)
        raise RuntimeError(f"{self._name} gives no text ({fault})")

    def _read_text(self, answer: Any) -> str:
        try:
            return str(answer.json()["text"])
        except (ValueError, KeyError, TypeError) as error:
            kind = answer.headers.get("content-type", "no type")
            raise ModelError(
                f"{self._name} answers with {kind} in place of JSON with a text: give the url of its /v1"
            ) from error

    @property
    def _name(self) -> str:
        return str(without_secrets(self._service.url))


def wav_bytes(samples: "np.ndarray[Any, Any]") -> bytes:
    """Encode samples at 16 kHz as a WAV file of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()


def _segment(chunk: Chunk, text: str, mean_logprob: float | None = None) -> Segment:
    end_s = chunk.start_s + len(chunk.clip.samples) / SAMPLE_RATE
    return Segment(chunk.start_s, end_s, text.strip(), mean_logprob)


def _api_key(service: Service) -> SecretStr | None:
    if service.api_key_env is None:
        return None
    if not (key := os.environ.get(service.api_key_env)):
        raise RecipeError(f"api_key_env={service.api_key_env}: that environment variable is not set: set it to the key")
    return SecretStr(key)


def _headers(api_key: SecretStr | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}


def _check_faster_whisper(name: str) -> None:
    """Raise ModelError for what is no folder, no size and no hub id."""
    sizes = require("faster_whisper", extra="faster-whisper").available_models()
    if not (Path(name, "model.bin").is_file() or name in sizes or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise ModelError(
            f"{FASTER_WHISPER}{name} is no Whisper in CTranslate2's format: "
            f"give a folder with model.bin, a hub id, or a size ({', '.join(sizes)})"
        )


def _check_service(service: Service) -> None:
    """Raise ModelError where a service cannot be reached, or does not take the key."""
    import requests

    headers, name = _headers(_api_key(service)), without_secrets(service.url)
    try:
        status = requests.get(f"{service.url.rstrip('/')}/models", headers=headers, timeout=30).status_code
    except (requests.RequestException, ValueError) as error:
        reason = type(error).__name__  # the error's text repeats the address, secrets included
        raise ModelError(f"{name} cannot be reached ({reason}): correct url, or start the service") from error
    if status in (401, 403):
        raise ModelError(f"{name} does not take the key (status {status}): set api_key_env to the variable of one")


def _retry_after(value: str | None) -> float:
    """Return the seconds that a service asks to wait; a date counts as none."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return 0.0
