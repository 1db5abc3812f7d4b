"""Aligners by what they are called in recipes: the bundled Whisper, or a folder or hub id of a Whisper or a CTC model."""

from typing import Any

from graft.checkpoints.names import absolute_checkpoint, checkpoint_name
from graft.errors import ModelError
from graft.inference.aligners.protocol import Aligner

BUNDLED = "whisper"
"""The bundled Whisper base."""


def open_aligner(model: str, *, device: str = "cpu") -> Aligner:
    """Open `whisper`, or a folder or hub id of a Whisper or a CTC model.

    Raises ModelError for what is neither, MissingExtra where the bundled Whisper's packages are not installed.
    """
    from graft.checkpoints.build import reading
    from graft.inference.aligners.cross_attention import WhisperAligner
    from graft.inference.aligners.ctc import CtcAligner

    folder, name, is_whisper = _found(model)
    with reading(folder):
        return (WhisperAligner if is_whisper else CtcAligner)(folder, name=name, device=device)


def find_aligner(model: str) -> tuple[str, str]:
    """What processes with another working folder open for `model`, and the aligner's name.

    Reads no weights, but for the bundled ones. Raises as `open_aligner`, but for weights that can't be read.
    """
    return BUNDLED if model == BUNDLED else absolute_checkpoint(model), _found(model)[1]


def _found(model: str) -> tuple[str, str, bool]:
    """The folder or hub id, the aligner's name, and whether it is a Whisper."""
    from graft.checkpoints.bundled.cache import bundled_whisper

    if model == BUNDLED:
        return str(bundled_whisper()), "whisper-base, cross-attention", True
    config = _config(model)
    name = checkpoint_name(model)
    if config.model_type == "whisper":
        return model, f"{name}, cross-attention", True
    if any("ForCTC" in kind for kind in config.architectures or ()):
        return model, f"{name}, CTC", False
    raise ModelError(
        f"{model} is a {config.model_type} checkpoint, no aligner: give {BUNDLED}, or that of a Whisper or a CTC model"
    )


def _config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        remedy = f"give {BUNDLED}, or a folder or hub id of a Whisper or a CTC model"
        raise ModelError(
            f"aligner {model} can't be read ({str(error).splitlines()[0].rstrip(':. ')}): {remedy}"
        ) from error
