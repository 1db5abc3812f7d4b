"""Load and convert weights in silence: a library call prints nothing, and commands say what they do."""

import contextlib
import io
import logging
import threading
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

_LOCK = threading.RLock()
_HINTING_LOGGERS = ("DeepSpeed", "bitsandbytes.backends.cpu.ops")
"""Loggers of packages that print hints when they are imported, which peft and accelerate do where they are there."""


@contextlib.contextmanager
def no_loading_bars() -> Iterator[None]:
    """Draw no bars of loading and saving weights inside the block; bars of downloads stay. One thread at a time."""
    with _LOCK:  # transformers has one hook for the whole process
        before = transformers_logging.set_tqdm_hook(
            lambda _, given, named: transformers_logging.EmptyTqdm(*given, **named)
        )
        try:
            yield
        finally:
            transformers_logging.set_tqdm_hook(before)


@contextlib.contextmanager
def no_gguf_bars() -> Iterator[None]:
    """Draw no bars of reading a GGUF file either, for which transformers asks no hook; errors are raised as usual."""
    with no_loading_bars(), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def quiet_conversion() -> Iterator[None]:
    """Print no bars and no hints while weights whose digests are known are converted; errors are logged and raised."""
    with no_loading_bars():
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        found = map(logging.getLogger, _HINTING_LOGGERS)
        loggers = [logger for logger in found if _is_error not in logger.filters]  # one conversion may need another
        for logger in loggers:
            logger.addFilter(_is_error)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            for logger in loggers:
                logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
