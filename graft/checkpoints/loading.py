"""Open models: a whole graft, a stage's output together with the graft it was trained on, or a plain Whisper."""

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import WhisperForConditionalGeneration

from graft.checkpoints.build import check_kind, reading
from graft.checkpoints.bundled.cache import bundled_whisper
from graft.checkpoints.lora import attach_adapters, has_adapters, nf4_config, round_to_nf4
from graft.checkpoints.names import WHISPER
from graft.checkpoints.projector_file import check_projector, load_projector, read_projector, weight_files
from graft.checkpoints.quiet import no_loading_bars
from graft.checkpoints.release import installed_graft, known_names
from graft.checkpoints.whisper import open_whisper, open_whisper_processor
from graft.errors import ModelError
from graft.model.configuration import GRAFT_MODEL_TYPES, AnyGraftConfig, TextGraftConfig, read_graft_config
from graft.model.modeling import AnyGraft, graft_class
from graft.processor import GraftProcessor, SpeechProcessor, read_graft_processor
from graft.storage.user_cache import file_digest

STAGE_FILE = "stage.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ModelKind = Literal["graft", "whisper"]


def multiplies_bf16(device: torch.device | str) -> bool:
    """Tell whether a device multiplies bf16 matrices in hardware; elsewhere bf16 takes several times as long as fp32.

    A CPU does so with AVX512-BF16, AMX or Arm's BF16. What oneDNN and torch call supported includes AVX-512 without
    BF16, which converts the numbers to fp32 and back.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def multiplies_int8() -> bool:
    """Tell whether this processor adds up products of 8-bit integers in 32 bits in one instruction: VNNI or AMX.

    Without it, oneDNN adds up pairs of products in 16 bits, where they may overflow.
    """
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def open_graft(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    nf4: bool = False,
    attention: str = "sdpa",
    rounded_to_nf4: bool = False,
) -> tuple[AnyGraft, GraftProcessor]:
    """Load a model and its processor.

    Args:
        path: a graft's folder, a stage's output folder, a hub id, or the name of a graft in the package.
        dtype: of the weights; by default the checkpoint's own.
        nf4: quantize the language model to NF4, as QLoRA does.
        attention: transformers' name of an attention implementation.
        rounded_to_nf4: round the language model's weights to NF4's values, but keep them in `dtype`.

    A stage's projector and its unmerged adapters are loaded into the graft that the stage was trained on; configuration
    and processor say which instructions it was trained for. Raises ModelError for anything else, and for a projector of
    zeros.
    """
    model = _load_model(base_checkpoint(path), dtype=dtype, device=device, nf4=nf4, attention=attention)
    if rounded_to_nf4:
        round_to_nf4(model)
    processor = open_processor(path)
    configure_as_trained(model.config, processor)
    if read_stage(path):
        load_projector(model, path)
        if has_adapters(path):
            attach_adapters(model, path)
    check_projector(model.audio_projector.state_dict(), source=str(path))
    return model.eval(), processor


def configure_as_trained(config: AnyGraftConfig, processor: GraftProcessor) -> None:
    """Say in a graft's configuration what its processor says it was trained for."""
    config.trained_styles = list(processor.trained_styles)
    config.trained_context = processor.trained_context
    config.trained_languages = list(processor.trained_languages)
    config.tokens_per_s = processor.tokens_per_s


def check_model(path: str | Path, *, engine: Literal["transformers", "vllm"] = "transformers") -> ModelKind:
    """Return the kind of a model that transcribes: `graft` for one and for a stage's output, or `whisper`.

    Raises ModelError for anything else, as check_graft does, and for a Whisper in vLLM. No weights are read but those
    of a stage's projector.
    """
    names = [*known_names(), WHISPER]
    close = difflib.get_close_matches(str(path), names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    remedy = f"{hint}give a folder, a hub id that answers, or one of {', '.join(names)}"
    kind = check_kind(base_checkpoint(path), *GRAFT_MODEL_TYPES, "whisper", name="graft or whisper", remedy=remedy)
    if kind in GRAFT_MODEL_TYPES:
        check_graft(path)
        if engine == "vllm" and kind == TextGraftConfig.model_type:
            raise ModelError(
                f"{path} is a graft on another language model than Qwen2-VL, which engine=vllm does not run: "
                "leave engine out"
            )
        return "graft"
    if engine == "vllm":
        raise ModelError(f"{path} is a whisper checkpoint, which engine=vllm does not run: leave engine out")
    return "whisper"


def open_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[AnyGraft | WhisperForConditionalGeneration, SpeechProcessor]:
    """Open a model that transcribes, a graft or a Whisper, with its processor. Raises ModelError as check_model."""
    if check_model(path) == "graft":
        return open_graft(path, dtype=dtype, device=device)
    return open_whisper(base_checkpoint(path), dtype=dtype, device=device)


def open_speech_processor(path: str | Path) -> SpeechProcessor:
    """Load the processor that open_model returns, without the model. Raises ModelError as check_model does."""
    return open_processor(path) if check_model(path) == "graft" else open_whisper_processor(base_checkpoint(path))


def model_digest(path: str | Path) -> str:
    """Compute the SHA-256 of the weights and configurations that open_model reads; a stage's includes its graft's."""
    digest = hashlib.sha256()
    names = ["config.json", STAGE_FILE, *(["generation_config.json"] if check_model(path) == "whisper" else [])]
    for part in [*([path] if read_stage(path) else []), base_checkpoint(path)]:
        weights = weight_files(part)
        folder = weights[0].parent
        for file in [*weights, *(folder / name for name in names if (folder / name).is_file())]:
            digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def open_processor(path: str | Path) -> GraftProcessor:
    """Load the processor that open_graft returns, without the model. Raises ModelError as open_graft does."""
    graft = base_checkpoint(path)
    check_kind(graft, *GRAFT_MODEL_TYPES, name="graft")
    with reading(graft):
        processor = read_graft_processor(graft)
    stage = read_stage(path) or {}
    processor.tokens_per_s = stage.get("tokens_per_s", processor.tokens_per_s)  # stages used not to say it
    if words := stage.get("words"):
        processor.trained_styles, processor.trained_context = words["styles"], words["context"]
        processor.trained_languages = words.get("languages", [])  # stages used to know none
    return processor


def check_graft(path: str | Path) -> None:
    """Raise ModelError unless a path is a graft, or a stage's output whose projector fits its graft.

    No other weights are read.
    """
    graft = base_checkpoint(path)
    check_kind(graft, *GRAFT_MODEL_TYPES, name="graft")
    if read_stage(path):
        read_projector(path, read_graft_config(graft))


def write_stage(
    folder: str | Path,
    *,
    stage: int,
    graft: str | Path,
    words: Mapping[str, Any] | None = None,
    tokens_per_s: float | None = None,
) -> None:
    """Record in a stage's output folder which graft it belongs to, by a path relative to that folder.

    `words` are the instructions that the stage was trained for (graft.text.instructions.trained_instructions); None
    keeps the graft's, as it does for the most tokens in a second of speech.
    """
    record = {
        "stage": stage,
        "graft": os.path.relpath(Path(graft).resolve(), Path(folder).resolve()),
        **({"words": dict(words)} if words is not None else {}),
        **({"tokens_per_s": tokens_per_s} if tokens_per_s is not None else {}),
    }
    Path(folder, STAGE_FILE).write_text(json.dumps(record) + "\n")


def read_stage(folder: str | Path) -> dict[str, Any] | None:
    """Read what write_stage wrote; None for a folder that is no stage's output."""
    path = Path(folder, STAGE_FILE)
    return json.loads(path.read_text()) if path.is_file() else None


def base_checkpoint(path: str | Path) -> str:
    """Return the whole checkpoint behind a path, as an absolute path or a hub id.

    It is the path itself, or the graft that a stage's output was trained on. Where no folder has that name, the name of
    a graft in the package stands for that graft, which is built at its first use, and `whisper` for the bundled Whisper
    base. Raises MissingExtra where the bundled weights are not installed.
    """
    stage = read_stage(path)
    folder = Path(path, stage["graft"]) if stage else Path(path)
    if folder.exists():
        return str(folder.resolve())
    if str(path) == WHISPER:
        return str(bundled_whisper())
    return str(installed_graft(str(path))) if str(path) in known_names() else str(path)


def _load_model(
    path: str, *, dtype: torch.dtype | None, device: str | torch.device, nf4: bool, attention: str
) -> AnyGraft:
    check_kind(path, *GRAFT_MODEL_TYPES, name="graft")
    # Only a quantized model needs accelerate's device_map: its weights are quantized on their way to the device.
    options = {"quantization_config": nf4_config(dtype or torch.bfloat16), "device_map": {"": device}} if nf4 else {}
    try:
        with no_loading_bars():
            model = graft_class(read_graft_config(path)).from_pretrained(
                path, dtype=dtype or "auto", attn_implementation=attention, **options
            )
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            reason if path in reason else f"{path} can't be read as a graft checkpoint ({reason}): build it again"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the weights in {path} can't be read ({str(error).splitlines()[0]}): copy or build them again"
        ) from error
    return model if nf4 else model.to(device)
