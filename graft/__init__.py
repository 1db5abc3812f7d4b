"""graft: a frozen Whisper encoder grafted onto Qwen2-VL.

>>> import graft
>>> transcriber = graft.load("runs/demo/merged")
>>> transcriber.transcribe("a.flac").text

The names load on first use: `import graft` alone brings in neither torch nor anything else that is heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.audio.clip import AudioClip
    from graft.errors import GraftError
    from graft.inference.transcriber import Transcriber, load
    from graft.inference.transcript import Segment, Transcript, Word

    __version__: str

_MODULES = {
    "AudioClip": "graft.audio.clip",
    "GraftError": "graft.errors",
    "Segment": "graft.inference.transcript",
    "Transcriber": "graft.inference.transcriber",
    "Transcript": "graft.inference.transcript",
    "Word": "graft.inference.transcript",
    "load": "graft.inference.transcriber",
}
__all__ = ["AudioClip", "GraftError", "Segment", "Transcriber", "Transcript", "Word", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("graft")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'graft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
