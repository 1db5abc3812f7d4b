"""Check a request's API key, the service's capacity and the size of the upload before and while its body is read."""

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..service import ServiceBusy
from .auth import ApiKeys
from .errors import ApiError, error_response

PROTECTED_PREFIX = "/v1/"


class AuthMiddleware:
    """ASGI middleware that refuses unknown keys (401) and uploads beyond the capacity (429) before the body is read.

    `check_capacity` gets the number of uploads that are being received, and raises ServiceBusy.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, check_capacity: Callable[[int], None]) -> None:
        self._app = app
        self._keys = keys
        self._check_capacity = check_capacity
        self._receiving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _path_in_app(scope).startswith(PROTECTED_PREFIX):
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            if scope["method"] == "POST":
                self._check_capacity(self._receiving)
        except (ApiError, ServiceBusy) as error:
            await error_response(error)(scope, receive, send)
            return
        await self._count_while_receiving(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
        if self._keys and not (scheme.lower() == "bearer" and key.strip() in self._keys):
            raise ApiError(
                401,
                "the API key is missing or unknown",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _count_while_receiving(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the request in `_receiving` until its body has ended; after that the service counts it."""
        counted = 1
        self._receiving += 1

        async def counting_receive() -> Message:
            nonlocal counted
            message = await receive()
            if not message.get("more_body"):
                self._receiving, counted = self._receiving - counted, 0
            return message

        try:
            await self._app(scope, counting_receive, send)
        finally:
            self._receiving -= counted


def _path_in_app(scope: Scope) -> str:
    """Return the path without the prefix at which the application is mounted (Ray Serve's route_prefix)."""
    root, path = scope.get("root_path", ""), str(scope["path"])
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


class UploadLimitMiddleware:
    """ASGI middleware that refuses bodies over `max_bytes` (413) and those that take longer than `max_s` (408)."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_s = max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = int(dict(scope["headers"]).get(b"content-length", b"0"))
        received, is_complete, deadline = 0, False, time.monotonic() + self._max_s

        async def limited_receive() -> Message:
            nonlocal received, is_complete
            if is_complete:
                return await receive()  # waits until the client disconnects
            self._check_size(announced)
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError as error:
                raise ApiError(408, f"the upload took longer than {self._max_s:g} s: send it again") from error
            received += len(message.get("body", b""))
            self._check_size(received)
            is_complete = not message.get("more_body")
            return message

        await self._app(scope, limited_receive, send)

    def _check_size(self, byte_count: int) -> None:
        if byte_count > self._max_bytes:
            message = f"the upload is over the limit of {self._max_bytes} bytes: compress or split the audio"
            raise ApiError(413, message, code="upload_too_large")
