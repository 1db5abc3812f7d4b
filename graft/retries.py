"""What goes wrong at a place: faults that may pass are tried again, lasting ones told in one line without anybody's secrets."""

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from graft.errors import DataError

T = TypeVar("T")

WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Before each further try; the hub's client and S3's own have tried several times by then."""

_HTTP_CLIENTS = {"httpx", "httpx2", "aiohttp", "requests"}
_LASTING = re.compile(r"AWS Error (ACCESS_DENIED|NO_SUCH|INVALID|RESOURCE_NOT_FOUND|SIGNATURE|UNRECOGNIZED|MISSING|.*HTTP status 4\d\d)")


def again(uri: str, action: Callable[[], T]) -> T:
    """Do what reads from a place, over again after faults that may pass. Raises DataError for one that lasts."""
    waits_s = iter(WAITS_S)
    while True:
        try:
            return action()
        except Exception as error:
            fault, wait_s = _fault(error), next(waits_s, None)
            if fault is None:
                raise
            if isinstance(fault, FileNotFoundError):
                hint = " (a private or gated one wants HF_TOKEN)" if uri.startswith("hf://") else ""
                raise DataError(f"{shown(uri)}: no such file or folder{hint}") from error
            if wait_s is None or not _may_pass(uri, fault):
                raise DataError(f"{shown(uri)}: {told(fault)}") from error
            time.sleep(wait_s * random.uniform(0.5, 1.0))  # not all workers at once


def shown(uri: str) -> str:
    """A URI as messages may show it: without user, secret and query."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "hf":  # whose @ stands before a revision
        return uri
    return f"{scheme}://{rest.rpartition('@')[2]}".partition("?")[0]


def told(error: BaseException) -> str:
    """What happened, in one line, without the secrets of the URIs in it."""
    text = re.sub(r"\b(?!hf:|https?:)(\w+://)[^'\"]*@", r"\1", str(error))
    text = re.sub(r"(https?://)[^/\s'\"]*@", r"\1", text)
    return " ".join(re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text).split()) or type(error).__name__


def _fault(error: BaseException | None) -> BaseException | None:
    """What is wrong with the place, None where it is a fault of the program."""
    if isinstance(error, FileNotFoundError) and _status(error.__cause__) not in (401, 404, 410):
        return _fault(error.__cause__) or error  # fsspec calls a file "not found" where a web server does not answer
    known = isinstance(error, OSError | pa.ArrowException) or type(error).__module__.partition(".")[0] in _HTTP_CLIENTS
    return error if known else None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that a client's error carries."""
    found = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return found if isinstance(found, int) else None


def _may_pass(uri: str, error: BaseException) -> bool:
    near = "://" not in uri or uri.startswith("file:")
    if near or isinstance(error, PermissionError | pa.ArrowException) or _LASTING.search(str(error)):
        return False
    status = _status(error)
    return type(error).__name__ != "OfflineModeIsEnabled" and (status is None or status in (408, 429) or status >= 500)
