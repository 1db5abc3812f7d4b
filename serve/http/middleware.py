"""What a request passes before it is read: its key, whether there is room for it, and how much of it is taken in. ASGI middlewares."""

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..service import Busy
from .auth import Keys
from .errors import Refusal, answer_to

GUARDED = "/v1/"


class AuthMiddleware:
    """Requests need a known key (else 401), uploads also room (else 429), before any of their body is read.

    `check_room` is told how many uploads are being received, and raises Busy.
    """

    def __init__(self, app: ASGIApp, keys: Keys, check_room: Callable[[int], None]) -> None:
        self._app = app
        self._keys = keys
        self._check_room = check_room
        self._receiving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _route(scope).startswith(GUARDED):
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            if scope["method"] == "POST":
                self._check_room(self._receiving)
        except (Refusal, Busy) as error:
            await answer_to(error)(scope, receive, send)
            return
        await self._counted(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
        if self._keys and not (scheme.lower() == "bearer" and self._keys.know(key.strip())):
            message = "the API key is missing or unknown"
            headers = {"WWW-Authenticate": "Bearer"}
            raise Refusal(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request counts as being received up to the end of its body."""
        left = 1
        self._receiving += 1

        async def counting() -> Message:
            nonlocal left
            message = await receive()
            if not message.get("more_body"):
                self._receiving, left = self._receiving - left, 0
            return message

        try:
            await self._app(scope, counting, send)
        finally:
            self._receiving -= left


def _route(scope: Scope) -> str:
    """The address as the API declares it: without what it is mounted under (Ray Serve's route_prefix)."""
    root, path = scope.get("root_path", ""), str(scope["path"])
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


class UploadLimitMiddleware:
    """A body over `max_bytes`, announced or not, is refused with 413, one that takes over `max_s` to come with 408."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_s = max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = int(dict(scope["headers"]).get(b"content-length", b"0"))
        received, is_whole, end = 0, False, time.monotonic() + self._max_s

        async def limited() -> Message:
            nonlocal received, is_whole
            if is_whole:
                return await receive()  # that the client leaves
            self._check_size(announced)
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except TimeoutError as error:
                raise Refusal(408, f"the upload took over {self._max_s:g} s to come: send it again") from error
            received += len(message.get("body", b""))
            self._check_size(received)
            is_whole = not message.get("more_body")
            return message

        await self._app(scope, limited, send)

    def _check_size(self, count: int) -> None:
        if count > self._max_bytes:
            raise Refusal(
                413, f"the upload is over {self._max_bytes} bytes: compress or cut the audio", code="upload_too_large"
            )
