"""Read a transcription request: a form with a file, or JSON with the audio in base64.

    body -> fields by name, audio in a file -> TranscriptionRequest -> TranscriptionOptions

Programs that speak to OpenAI's API send fields that a speech model may not be able to honour. Those that are hints are
ignored and named in a header of the answer. Those on which the answer's language or shape depends are refused.
"""

import asyncio
import base64
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import pydantic_core
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from graft.errors import GraftError, ModelError
from graft.text.languages import language_code
from graft.text.prompts import check_context_words, check_language

from ..fairness import FairSlots
from ..service import ModelInfo, TranscriptionOptions
from .errors import ApiError
from .schema import HINTS, LISTS, TranscriptionRequest

IGNORED_HEADER = "X-Graft-Ignored"
"""Header that names the fields of a request that were ignored."""
MAX_NAMED = 20
MAX_NAME_LENGTH = 40
"""Most fields that the header names, and the most characters of each."""
MAX_JSON_VALUES = 10_000
"""Most values in a JSON body; base64 has none of the signs that separate them."""
HOW_TO_SEND = "send the audio as the file `file` of a form, or in base64 as `input_audio` of a JSON object"
ANY_LANGUAGE = {"", "auto", "detect", "none", "null", "undefined"}
"""Values of `language` that name no language."""
REFUSED = {
    ("response_format", "diarized_json"): "the service does not tell speakers apart: ask for json or verbose_json",
    ("task", "translate"): "the service does not translate: it writes what is said in the language in which it is said",
}
"""Values that the API knows and the service does not provide, with the reason."""


@dataclass
class TranscriptionBody:
    """The fields of a request's body by name, without `[]`, and the names under which they were sent.

    `faults` are the fields that cannot be honoured, as they were sent, each with the error that says why.
    """

    values: dict[str, Any]
    sent_names: dict[str, str]
    faults: dict[str, ApiError] = field(default_factory=dict)

    @classmethod
    def collect(cls, items: Iterable[tuple[str, Any]]) -> "TranscriptionBody":
        """Make a body of fields as they were sent, in which a name may occur several times; blank ones are left out."""
        body = cls({}, {})
        for sent_name, value in items:
            name = sent_name.partition("[")[0]  # keywords[], chunking_strategy[type]
            if name in LISTS:
                values = value if isinstance(value, list) else _list_in_text(value)
                value = [*body.values.get(name, []), *(one for one in values if not _is_blank(one))]
            if not _is_blank(value):
                body.values[name] = value
                body.sent_names.setdefault(name, f"{name}[]" if sent_name.endswith("[]") else name)
        return body

    def validate(self) -> TranscriptionRequest:
        """Return the known fields without those that are malformed hints. Raises ApiError, RequestValidationError."""
        for (name, value), message in REFUSED.items():
            if self.values.get(name) == value:
                raise ApiError(400, message, param=name, code="unsupported_value")
        for name in self.values:
            if name not in TranscriptionRequest.model_fields:
                message = f"the parameter {self.sent_names[name]!r:.100} is not supported"
                self.refuse(name, message, "unsupported_parameter")
        known = {name: value for name, value in self.values.items() if name in TranscriptionRequest.model_fields}
        try:
            return TranscriptionRequest.model_validate(known)
        except ValidationError as error:
            for detail in error.errors():
                name = str(detail["loc"][0])
                sent_name = self.sent_names.get(name, name)
                if name not in HINTS:
                    raise RequestValidationError([{**detail, "loc": ("body", sent_name)}]) from error
                known.pop(name, None)
                self.refuse(name, f"{sent_name}: {detail['msg']}")
        return TranscriptionRequest.model_validate(known)

    def refuse(self, name: str, message: str, code: str = "unsupported_value") -> None:
        """Note that a field cannot be honoured."""
        sent_name = self.sent_names.get(name, name)
        self.faults.setdefault(sent_name, ApiError(400, message, param=sent_name, code=code))


def _is_blank(value: Any) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def _list_in_text(value: Any) -> Sequence[Any]:
    """Return the items of a JSON list that was sent as text; any other value is one item."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return list(pydantic_core.from_json(value))
        except ValueError:
            pass
    return [value]


@asynccontextmanager
async def receive_body(request: Request, json_slots: FairSlots) -> AsyncIterator[tuple[TranscriptionBody, str]]:
    """Read a request's fields and write its audio to a file, which exists until the block ends; yields both.

    JSON bodies, which need several times their size in memory, are decoded as `json_slots` allows. Raises ApiError.
    """
    with tempfile.NamedTemporaryFile(prefix="graft-upload-") as file:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type == "application/json":
            body = await _read_json(request, file, json_slots)
        else:
            body = await _read_form(request, file)
        file.flush()
        yield body, file.name


async def _read_form(request: Request, file: IO[bytes]) -> TranscriptionBody:
    """Read a form, whose files Starlette keeps on the disk."""
    async with request.form() as form:
        items = form.multi_items()
        upload = form.get("file")
        if upload is None:
            raise _missing("file")
        if not isinstance(upload, UploadFile):
            raise ApiError(400, "file: send it as a part with a filename", param="file", code="unsupported_value")
        await asyncio.to_thread(shutil.copyfileobj, upload.file, file, 2**20)
        # Other files count as unknown fields or malformed hints: their contents are not read.
        return TranscriptionBody.collect((name, value) for name, value in items if name != "file")


async def _read_json(request: Request, file: IO[bytes], json_slots: FairSlots) -> TranscriptionBody:
    """Read a JSON object; the file first holds the body and then the audio."""
    async for part in request.stream():
        await asyncio.to_thread(file.write, part)
    async with json_slots.slot(request.state.client.id):
        values = await asyncio.to_thread(_decode_json, file)
    return TranscriptionBody.collect(values.items())


def _decode_json(file: IO[bytes]) -> dict[str, Any]:
    """Replace the JSON in a file by the audio in it; returns the other values. Raises ApiError."""
    file.seek(0)
    data = file.read()
    # Small values would need 30 times their size in memory.
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ApiError(400, f"the JSON body has more than {MAX_JSON_VALUES} values: leave some out")
    try:
        values = pydantic_core.from_json(data)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ApiError(400, f"the JSON body is not an object: {HOW_TO_SEND}")
    name = "file" if "file" in values else "input_audio"
    audio = values.pop(name, None)
    if isinstance(audio, dict):
        audio = audio.get("data")
    if audio is None:
        raise _missing("input_audio")
    if not isinstance(audio, str):
        raise ApiError(400, f"{name}: {HOW_TO_SEND}", param=name, code="unsupported_value")
    text = audio.partition(",")[2] if audio.startswith("data:") else audio
    try:
        decoded = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ApiError(400, f"{name} is not base64: {HOW_TO_SEND}", param=name, code="unsupported_value") from error
    file.seek(0)
    file.truncate()
    file.write(decoded)
    return values


def check_model(name: str, info: ModelInfo, aliases: Collection[str]) -> None:
    """Raise ApiError where no model has this name."""
    if name != info.name and name not in aliases:
        message = f"the model {name!r:.100} does not exist: use {info.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _missing(name: str) -> ApiError:
    message = f"the parameter {name!r} is missing: {HOW_TO_SEND}"
    return ApiError(400, message, param=name, code="missing_required_parameter")


def read_options(body: TranscriptionBody, request: TranscriptionRequest, info: ModelInfo) -> TranscriptionOptions:
    """Return what the model is asked for; what it cannot honour is noted in the body.

    Raises ApiError for fields on which the answer's language or shape depends.
    """
    has_words = request.response_format in ("verbose_json", "srt", "vtt")
    wants_words = "word" in request.timestamp_granularities
    for name, is_supported, message in (
        (
            "timestamp_granularities",
            info.supports_word_timestamps or not (wants_words and has_words),
            "word timestamps need an aligner, and no aligner is loaded: start the service with aligner=whisper",
        ),
        (
            "stream",
            not request.stream or request.response_format in ("json", "text"),
            "stream needs response_format json or text",
        ),
    ):
        if not is_supported:
            param = body.sent_names.get(name, name)
            raise ApiError(400, message, param=param, code="unsupported_value")
    if wants_words and not has_words:
        body.refuse("timestamp_granularities", "word timestamps need response_format verbose_json, srt or vtt")
    if request.include and not (request.stream or request.response_format == "json"):
        body.refuse("include", "log-probabilities of tokens need response_format json or a stream")
    if request.temperature:
        body.refuse("temperature", "temperature must be 0: decoding is greedy")
    language = _read_language(request.language, info)
    return TranscriptionOptions(
        context=_read_context(body, request, info),
        word_timestamps=wants_words and has_words,
        logprobs=bool(request.include),
        language=language,
        finds_language=language is None and info.finds_language,
    )


def _read_language(value: str | None, info: ModelInfo) -> str | None:
    """Return the code of the language of the speech, None where it is not known. Raises ApiError."""
    asked = (value or "").strip()
    if asked.lower() in ANY_LANGUAGE:
        return info.language
    try:
        if info.languages:
            return check_language(asked, info.languages)
        if (code := language_code(asked)) == info.language:
            return code
        message = f"the model transcribes {info.language!r} only"
    except GraftError as error:
        message = str(error)
    raise ApiError(400, message, param="language", code="unsupported_value")


def _read_context(body: TranscriptionBody, request: TranscriptionRequest, info: ModelInfo) -> tuple[str, ...] | None:
    """Return the words that may occur; None where there are none, or the model or their number does not allow them."""
    words = [*re.split(r"[,;\n]+", request.prompt or ""), *request.keywords]
    words = [word for word in words if word.strip(" ,.\t\r\n")]
    if not words:
        return None
    try:
        context = tuple(check_context_words(words))
        message, code = "the model was not trained for lists of words", "unsupported_parameter"
    except ModelError as error:
        context, message, code = (), str(error), "unsupported_value"
    if context and info.supports_context:
        return context
    for name in ("prompt", "keywords"):
        if getattr(request, name):
            body.refuse(name, message, code)
    return None


def ignored_header(names: Iterable[str]) -> Mapping[str, str]:
    """Return the header that names ignored fields, without signs that a header may not have; empty without any."""
    safe = list(dict.fromkeys(re.sub(r"[^\w.\[\]-]", "_", name[:MAX_NAME_LENGTH], flags=re.ASCII) for name in names))
    shown = [*safe[:MAX_NAMED], "..."] if len(safe) > MAX_NAMED else safe
    return {IGNORED_HEADER: ", ".join(shown)} if shown else {}
