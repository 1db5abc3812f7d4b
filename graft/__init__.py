"""graft: a frozen Whisper encoder grafted onto Qwen2-VL.

>>> import graft
>>> transcriber = graft.load("runs/demo/merged")
>>> transcriber.transcribe("a.flac").text

The names load on first use: `import graft` alone brings in neither torch nor anything else that is heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.audio.clip import AudioClip
    from graft.errors import GraftError
    from graft.inference.segments import Segment, Word
    from graft.inference.transcriber import Transcriber
    from graft.inference.transcriber import open_transcriber as load
    from graft.inference.transcript import Transcript

    __version__: str

_EXPORTS = {  # public name -> module and name there
    "AudioClip": ("graft.audio.clip", "AudioClip"),
    "GraftError": ("graft.errors", "GraftError"),
    "Segment": ("graft.inference.segments", "Segment"),
    "Transcriber": ("graft.inference.transcriber", "Transcriber"),
    "Transcript": ("graft.inference.transcript", "Transcript"),
    "Word": ("graft.inference.segments", "Word"),
    "load": ("graft.inference.transcriber", "open_transcriber"),
}
__all__ = ["AudioClip", "GraftError", "Segment", "Transcriber", "Transcript", "Word", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("graft-asr")
    if name in _EXPORTS:
        from graft.imports import import_heavy

        module, attribute = _EXPORTS[name]
        return getattr(import_heavy(module), attribute)
    raise AttributeError(f"module 'graft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
