"""Open aligners by the names that recipes give them: `whisper`, or a folder or hub id of a Whisper or a CTC model."""

from typing import Any

from graft.checkpoints.names import WHISPER, absolute_checkpoint, checkpoint_name
from graft.errors import ModelError
from graft.inference.aligners.protocol import Aligner


def open_aligner(model: str, *, device: str = "cpu") -> Aligner:
    """Open `whisper`, or a folder or hub id of a Whisper or a CTC model.

    Raises ModelError for any other checkpoint, MissingExtra where the bundled Whisper's packages are not installed.
    """
    from graft.checkpoints.build import reading
    from graft.inference.aligners.cross_attention import WhisperAligner
    from graft.inference.aligners.ctc import CtcAligner

    folder, name, is_whisper = _resolve(model)
    with reading(folder):
        return (WhisperAligner if is_whisper else CtcAligner)(folder, name=name, device=device)


def find_aligner(model: str) -> tuple[str, str]:
    """Return the name that processes with another working folder open, and the aligner's own name.

    Reads no weights, except the bundled ones. Raises as `open_aligner` does, except for weights that cannot be read.
    """
    return WHISPER if model == WHISPER else absolute_checkpoint(model), _resolve(model)[1]


def _resolve(model: str) -> tuple[str, str, bool]:
    """Return the folder or hub id, the aligner's name, and whether it is a Whisper."""
    from transformers import AutoConfig

    from graft.checkpoints.bundled.cache import bundled_whisper

    if model == WHISPER:
        return str(bundled_whisper()), "whisper-base, cross-attention", True
    remedy = f"give {WHISPER}, or a folder or hub id of a Whisper or a CTC model"
    try:
        config: Any = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(":. ")
        raise ModelError(f"aligner {model} can't be read ({reason}): {remedy}") from error
    name = checkpoint_name(model)
    if config.model_type == "whisper":
        return model, f"{name}, cross-attention", True
    if any("ForCTC" in architecture for architecture in config.architectures or ()):
        return model, f"{name}, CTC", False
    raise ModelError(f"{model} is a {config.model_type} checkpoint, no aligner: {remedy}")
