"""Report each request and its failure, and check its API key, the service's capacity and the upload's size."""

import asyncio
import hashlib
import hmac
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graft.errors import RecipeError

from ..logs import LOG, REQUEST_ID, Observer
from ..service import ServiceBusy, ServiceStopping
from .errors import ApiError, describe_exception, error_response

KEYS_VARIABLE = "GRAFT_API_KEYS"
PROTECTED_PREFIX = "/v1/"
CLIENT_CLOSED_REQUEST = 499
"""Status in logs and metrics of a request whose client left before the response began."""


class RequestMiddleware:
    """ASGI middleware that gives each request an id, the client's X-Request-Id or a new one, and logs its end.

    The response carries the id too, unless `sends_id` is false: Ray Serve's proxies add the header themselves. An
    unexpected exception is answered with 500, and its class and place are logged. Starlette's own middleware for that
    also raises it again, and servers then log the traceback with its paths.
    """

    def __init__(self, app: ASGIApp, observer: Observer, *, sends_id: bool = True) -> None:
        self._app, self._observer, self._sends_id = app, observer, sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("ascii", "replace")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        start, status, has_begun, has_left = time.monotonic(), CLIENT_CLOSED_REQUEST, False, False

        async def watched_receive() -> Message:
            nonlocal has_left
            message = await receive()
            has_left = has_left or message["type"] == "http.disconnect"
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = CLIENT_CLOSED_REQUEST if has_left else message["status"], True
                if self._sends_id:
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
        except Exception as error:
            LOG.error("a request failed: %s", describe_exception(error))
            if has_begun:
                status = 500
                raise
            await error_response(error)(scope, receive, watched_send)
        finally:
            seconds = time.monotonic() - start
            # The route's template, not the requested path, so that metrics have few distinct labels.
            self._observer.on_response(getattr(scope.get("route"), "path", "other"), status, seconds)
            path = quote(scope["path"])  # a decoded path may hold line ends
            fields = {"request_id": request_id, "method": scope["method"], "path": path, "status": status}
            LOG.info("%(method)s %(path)s %(status)s", fields, extra=fields | {"seconds": round(seconds, 3)})


class ApiKeys:
    """A set of API keys, kept as SHA-256 digests. An empty set means that requests are not authenticated."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def from_environment(cls, file: str | None = None) -> "ApiKeys":
        """Read the keys in GRAFT_API_KEYS, separated by commas, and those in a file, one a line. Raises RecipeError."""
        keys = os.environ.get(KEYS_VARIABLE, "").split(",")
        if file is not None:
            try:
                keys += Path(file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"key_file {file} cannot be read: give a text file with one key a line") from error
        return cls(key.strip() for key in keys if key.strip())

    def __or__(self, other: "ApiKeys") -> "ApiKeys":
        union = ApiKeys()
        union._digests = [*self._digests, *other._digests]
        return union

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, key: str) -> bool:
        digest = _digest(key)
        # A list, so that every key is compared and the time does not tell which one matched.
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class AccessMiddleware:
    """ASGI middleware that refuses requests to /v1/ before and while their body is read.

    Unknown keys (401), uploads beyond the capacity (429) and announced sizes over `max_bytes` (413) are refused before
    the body is read; bodies that turn out larger (413), or take longer than `max_s` seconds (408), while it is read.
    `check_capacity` gets the number of uploads that are being received, and raises ServiceBusy.
    """

    def __init__(
        self, app: ASGIApp, keys: ApiKeys, check_capacity: Callable[[int], None], max_bytes: int, max_s: float
    ) -> None:
        self._app, self._keys, self._check_capacity = app, keys, check_capacity
        self._max_bytes, self._max_s = max_bytes, max_s
        self._receiving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _path_in_app(scope).startswith(PROTECTED_PREFIX):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check_key(headers.get(b"authorization", b"").decode("latin-1"))
            if scope["method"] == "POST":
                self._check_capacity(self._receiving)
            self._check_size(int(headers.get(b"content-length", b"0")))
        except (ApiError, ServiceBusy, ServiceStopping) as error:
            await error_response(error)(scope, receive, send)
            return
        received, is_complete, deadline = 0, False, time.monotonic() + self._max_s
        self._receiving += 1  # until the body has ended; after that the service counts the request

        async def checked_receive() -> Message:
            nonlocal received, is_complete
            if is_complete:
                return await receive()  # waits until the client disconnects
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(408, f"the upload took longer than {self._max_s:g} s: send it again") from error
            received += len(message.get("body", b""))
            self._check_size(received)
            if not message.get("more_body"):
                is_complete = True
                self._receiving -= 1
            return message

        try:
            await self._app(scope, checked_receive, send)
        finally:
            self._receiving -= not is_complete

    def _check_key(self, authorization: str) -> None:
        scheme, _, key = authorization.partition(" ")
        if self._keys and not (scheme.lower() == "bearer" and key.strip() in self._keys):
            raise ApiError(
                401,
                "the API key is missing or unknown",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_size(self, byte_count: int) -> None:
        if byte_count > self._max_bytes:
            message = f"the upload is over the limit of {self._max_bytes} bytes: compress or split the audio"
            raise ApiError(413, message, code="upload_too_large")


def _path_in_app(scope: Scope) -> str:
    """Return the path without the prefix at which the application is mounted (Ray Serve's route_prefix)."""
    root, path = scope.get("root_path", ""), str(scope["path"])
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
