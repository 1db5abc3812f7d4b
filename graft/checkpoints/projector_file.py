"""Read and write projector.safetensors: a trained projector with the digests of the bases it was trained on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.errors import ModelError
from graft.model.configuration import AnyGraftConfig
from graft.model.modeling import AnyGraft

PROJECTOR_FILE = "projector.safetensors"
VARIANTS = "model.*.safetensors"


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of tensors from their names, dtypes, shapes and bytes, independent of how files hold them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def encoder_digest(graft: str | Path) -> str:
    """Compute state_digest of the encoder in a graft's folder or hub id; no other weights are read."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(graft):
        with safe_open(path, framework="pt") as file:
            names = [name for name in list(file.keys()) if name.startswith("audio_tower.")]
            tensors |= {name: file.get_tensor(name) for name in names}
    return state_digest(tensors)


def weight_files(graft: str | Path) -> list[Path]:
    """List the safetensors files of a model's folder or hub id; those of a hub id are downloaded.

    Variants that transformers reads on request alone, such as model.fp16.safetensors, are left out. Raises ModelError
    where there are none.
    """
    from huggingface_hub import snapshot_download

    folder = Path(graft)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(graft), allow_patterns="*.safetensors", ignore_patterns=VARIANTS))
    if files := [path for path in sorted(folder.glob("*.safetensors")) if not path.match(VARIANTS)]:
        return files
    raise ModelError(f"{graft} has no *.safetensors file: save it again with save_pretrained of transformers")


def write_projector(state: Mapping[str, Tensor], config: AnyGraftConfig, folder: str | Path) -> None:
    """Write a projector's tensors in float32, with its kind and the digests of the bases that it belongs to."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, Path(folder) / PROJECTOR_FILE, metadata={"graft": json.dumps(_identity(config))})


def load_projector(model: AnyGraft, folder: str | Path) -> None:
    """Load a trained projector into a graft. Raises ModelError as read_projector does."""
    model.audio_projector.load_state_dict(read_projector(folder, model.config))


def read_projector(folder: str | Path, config: AnyGraftConfig) -> dict[str, Tensor]:
    """Read a trained projector for a graft of this configuration.

    Raises ModelError when the file is missing or broken, when the projector is of another kind or was trained on other
    bases, and when it holds only zeros.
    """
    path = Path(folder) / PROJECTOR_FILE
    if not path.is_file():
        raise ModelError(f"{path} is missing: give the output folder of a finished stage")
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("graft", "{}"))
        state = load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} can't be read ({error}): copy it again or train it again") from error
    for key, expected in _identity(config).items():
        if found.get(key) != expected:
            raise ModelError(
                f"{path} was trained with {key}={found.get(key)}, the graft has {expected}: train it on this graft"
            )
    check_projector(state, source=str(path))
    return state


def check_projector(state: Mapping[str, Tensor], *, source: str) -> None:
    """Raise ModelError when a matrix of a projector is all zeros or holds a value that is not finite."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"{source}: audio_projector.{name} holds values that are not finite: go back to an earlier checkpoint"
            )
        if tensor.ndim > 1 and not tensor.any() and not name.startswith("blocks."):  # which begin at zero
            raise ModelError(
                f"{source}: audio_projector.{name} is all zeros, so audio has no effect: "
                "train stage 1 or build it again"
            )


def _identity(config: AnyGraftConfig) -> dict[str, object]:
    return {
        "base_digests": config.base_digests,
        "audio_projector": config.audio_projector,
        **({"audio_projector_blocks": config.audio_projector_blocks} if config.audio_projector == "conv" else {}),
        "audio_pool": config.audio_pool,
        "prompt_style": config.prompt_style,
    }
