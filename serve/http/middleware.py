"""Report each request and its failure, and check its API key, the service's capacity and the upload's size."""

import asyncio
import hashlib
import hmac
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graft.errors import RecipeError

from ..logs import LOG, REQUEST_ID, Observer
from ..service import ANONYMOUS, NOBODY, Client, ServiceBusy, ServiceStopping
from .errors import ApiError, describe_exception, error_response
from .realtime import websocket_key
from .uploads import UploadCounts, UploadTimer

KEYS_VARIABLE = "GRAFT_API_KEYS"
PROTECTED_PREFIX = "/v1/"
UNNAMED = "unnamed"
"""Name of all keys that have none, in logs and metrics."""
KEY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
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
        if scope["type"] == "websocket":
            await self._observe_websocket(scope, receive, send)
            return
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
            key = scope.get("state", {}).get("client", NOBODY).name
            # The route's template, not the requested path, so that metrics have few distinct labels.
            self._observer.on_response(getattr(scope.get("route"), "path", "other"), status, seconds, key=key)
            path = quote(scope["path"])  # a decoded path may hold line ends
            fields = {"request_id": request_id, "method": scope["method"], "path": path, "status": status, "key": key}
            LOG.info("%(method)s %(path)s %(status)s", fields, extra=fields | {"seconds": round(seconds, 3)})

    async def _observe_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a WebSocket, and report its end; its status is the code with which it was closed."""
        start, state = time.monotonic(), scope.setdefault("state", {})
        try:
            await self._app(scope, receive, send)
        finally:
            status, seconds = state.get("status", CLIENT_CLOSED_REQUEST), time.monotonic() - start
            key = state.get("client", NOBODY).name
            self._observer.on_response(getattr(scope.get("route"), "path", "other"), status, seconds, key=key)
            fields = {"method": "WS", "path": quote(scope["path"]), "status": status, "key": key}
            LOG.info("%(method)s %(path)s %(status)s", fields, extra=fields | {"seconds": round(seconds, 3)})


class ApiKeys:
    """A set of API keys, kept as SHA-256 digests, some of which have names.

    An empty set means that requests are not authenticated.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Take entries of the form `key` or `name: key`. Raises RecipeError."""
        self._clients: dict[bytes, Client] = {}
        for entry in keys:
            self._add(entry, "an API key")

    @classmethod
    def from_environment(cls, file: str | None = None) -> "ApiKeys":
        """Read the keys in GRAFT_API_KEYS, separated by commas, and those in a file, one a line. Raises RecipeError."""
        keys = cls()
        for number, entry in enumerate(os.environ.get(KEYS_VARIABLE, "").split(","), 1):
            keys._add(entry, f"{KEYS_VARIABLE}, entry {number}")
        if file is not None:
            try:
                lines = Path(file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"key_file {file} cannot be read: give a text file with one key a line") from error
            for number, line in enumerate(lines, 1):
                keys._add(line, f"key_file {file}, line {number}")
        return keys

    def _add(self, entry: str, place: str) -> None:
        """Add an entry, unless it is blank. A colon with nothing but more of the key behind it belongs to the key."""
        match = re.fullmatch(r"(?:([^:]*):(?=\s|$))?(.*)", entry.strip())
        name, key = match.groups() if match else (None, entry)
        if name is None and not key:
            return
        if not (key := key.strip()):
            raise RecipeError(f"{place}: the key is empty: write `name: key`, or the key alone")
        if name is not None and not KEY_NAME.fullmatch(name):
            message = "a name has 1 to 64 letters, digits, dots, hyphens and underscores, and is followed by a colon"
            raise RecipeError(f"{place}: {message}")
        if name in (ANONYMOUS, UNNAMED):
            raise RecipeError(f"{place}: metrics use the name {name} for keys without one: choose another")
        digest = _digest(key)
        client = Client(digest.hex(), name or UNNAMED)
        known = self._clients.get(digest, client)
        if name and (known.name not in (name, UNNAMED) or self._has_other_key(name, digest)):
            raise RecipeError(f"{place}: the name {name} or its key occurs twice: give each key one name of its own")
        self._clients[digest] = client if known.name == UNNAMED else known

    def _has_other_key(self, name: str, digest: bytes) -> bool:
        return any(client.name == name and known != digest for known, client in self._clients.items())

    def __or__(self, other: "ApiKeys") -> "ApiKeys":
        union = ApiKeys()
        for digest, client in [*self._clients.items(), *other._clients.items()]:
            if digest not in union._clients or client.name != UNNAMED:
                union._clients[digest] = client
        return union

    def __len__(self) -> int:
        return len(self._clients)

    def find(self, key: str) -> Client | None:
        """Return the client that a key belongs to; None for an unknown key."""
        digest = _digest(key)
        # A list, so that every key is compared and the time does not tell which one matched.
        found = [client for known, client in self._clients.items() if hmac.compare_digest(digest, known)]
        return found[0] if found else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class AccessMiddleware:
    """ASGI middleware that refuses requests to /v1/ before and while their body is read.

    Unknown keys (401), uploads beyond the capacity (429) and announced sizes over `max_bytes` (413) are refused before
    the body is read; bodies that turn out larger (413), or that take longer than `max_s` seconds or come at less than
    `min_bytes_per_s` (408), while it is read. `check_capacity` gets the client and the number of its uploads that have
    no complete answer yet, and raises ServiceBusy or ServiceStopping. At most `max_arriving` uploads arrive at a time,
    and more only of clients that have less than their share of them.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        check_capacity: Callable[[Client, int], None],
        *,
        max_arriving: int,
        max_bytes: int,
        max_s: float,
        min_bytes_per_s: float,
    ) -> None:
        self._app, self._keys, self._check_capacity = app, keys, check_capacity
        self._max_bytes, self._max_s, self._min_bytes_per_s = max_bytes, max_s, min_bytes_per_s
        self._max_arriving = max_arriving
        self._arriving, self._unanswered = UploadCounts(), UploadCounts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            self._check_websocket(scope)
        if scope["type"] != "http" or not _path_in_app(scope).startswith(PROTECTED_PREFIX):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            client = self._find_client(scope, headers.get(b"authorization", b"").decode("latin-1"))
            scope.setdefault("state", {})["client"] = client
            if scope["method"] == "POST":
                self._check_capacity(client, self._unanswered[client])
                self._arriving.check(client, self._max_arriving)
            self._check_size(int(headers.get(b"content-length", b"0")))
        except (ApiError, ServiceBusy, ServiceStopping) as error:
            await error_response(error)(scope, receive, send)
            return
        received, is_complete = 0, False
        timer = UploadTimer(self._max_s, self._min_bytes_per_s)
        arriving = ExitStack()

        async def checked_receive() -> Message:
            nonlocal received, is_complete
            if is_complete:
                return await receive()  # waits until the client disconnects
            try:
                async with asyncio.timeout(timer.remaining_s):
                    message = await receive()
            except TimeoutError as error:
                raise timer.error() from error
            size = len(message.get("body", b""))
            timer.on_part(size)
            received += size
            self._check_size(received)
            if not message.get("more_body"):
                is_complete = True
                arriving.close()
            return message

        if scope["method"] != "POST":
            await self._app(scope, checked_receive, send)
            return
        with self._unanswered.one_of(client), arriving:
            arriving.enter_context(self._arriving.one_of(client))  # until the body has ended
            await self._app(scope, checked_receive, send)

    def _check_websocket(self, scope: Scope) -> None:
        """Note who opens a WebSocket, or why it is to be refused: the application refuses it, by an event."""
        state = scope.setdefault("state", {})
        try:
            state["client"] = self._find_client(scope, websocket_key(scope))
        except ApiError as error:
            state["refusal"] = error

    def _find_client(self, scope: Scope, authorization: str) -> Client:
        """Return who sends a request. Raises ApiError for an unknown key."""
        if not self._keys:
            host, _ = scope.get("client") or ("", 0)
            return Client(host)
        scheme, _, key = authorization.partition(" ")
        client = self._keys.find(key.strip())
        if client is None or scheme.lower() != "bearer":
            raise ApiError(
                401,
                "the API key is missing or unknown",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return client

    def _check_size(self, byte_count: int) -> None:
        if byte_count > self._max_bytes:
            message = f"the upload is over the limit of {self._max_bytes} bytes: compress or split the audio"
            raise ApiError(413, message, code="upload_too_large")


def _path_in_app(scope: Scope) -> str:
    """Return the path without the prefix at which the application is mounted (Ray Serve's route_prefix)."""
    root, path = scope.get("root_path", ""), str(scope["path"])
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
