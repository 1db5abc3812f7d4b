"""Read and write the trained part of a graft without its bases, which graft export writes and graft build loads.

    pretrained.json                   the bases, the graft's settings, and what it was trained for
    adapter*.safetensors              projector, adapters and audio tokens' embeddings, in one file or in shards
    README.md, recipes/, recipe.yaml  for people

Each folder of graft/pretrained/ comes with the package; its name stands for a whole graft of the bundled bases.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from graft.checkpoints.build import build_graft
from graft.checkpoints.bundled.cache import (
    CONVERSION,
    bundled_qwen2vl,
    bundled_whisper,
    cached_folder,
    write_cached,
)
from graft.checkpoints.lora import (
    LoraSettings,
    add_adapters,
    load_adapters,
    merge_adapters,
    round_to_nf4,
    save_adapters,
)
from graft.checkpoints.projector_file import check_projector, state_digest, weight_files, write_projector
from graft.errors import ModelError
from graft.model.configuration import AnyGraftConfig
from graft.model.modeling import AnyGraft
from graft.processor import ENGLISH_TOKENS_PER_S, GraftProcessor

FOLDER = Path(__file__).parents[1] / "pretrained"
FORMAT = 1  # version of the files; a new one keeps older code from misreading them
SETTINGS_FILE = "pretrained.json"
WEIGHTS = "adapter{suffix}.safetensors"
PROJECTOR = "audio_projector."
AUDIO_TOKENS = "audio_tokens.weight"
"""Name of the audio tokens' embedding rows, which are random where the text base had no spare rows."""
HEADER_BYTES = 320
"""Upper limit for the header bytes of one tensor in a safetensors file: its name, dtype, shape and offsets."""


@dataclass(frozen=True)
class Pretrained:
    """The content of pretrained.json besides the format's version."""

    audio_base: str
    """Whisper checkpoint that it was trained on, as graft build takes it."""
    text_base: str
    """Qwen2-VL checkpoint that it was trained on."""
    base_digests: dict[str, str]
    settings: dict[str, Any]
    """Arguments of build_graft: audio, prompt and text settings, and the seed."""
    trained_styles: list[str]
    trained_context: bool
    adapters: LoraSettings | None
    onto: str
    """`full`: the adapters were trained on the text base's own weights; `nf4`: on weights rounded to NF4."""
    dtype: str
    """Dtype of the tensors in the files."""
    digest: str
    """state_digest of those tensors."""
    trained_languages: list[str] = field(default_factory=list)
    tokens_per_s: float = ENGLISH_TOKENS_PER_S


def known_names() -> list[str]:
    """List the names of the pretrained grafts in the package."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{SETTINGS_FILE}"))


def pretrained_folder(source: str) -> Path:
    """Find the folder of a pretrained graft, given its name in the package or the folder itself.

    Raises ModelError where there is none.
    """
    for folder in (FOLDER / source, Path(source)):
        if (folder / SETTINGS_FILE).is_file():
            return folder
    known = ", ".join(known_names()) or "none come with this installation"
    raise ModelError(f"{source} is no pretrained graft: give a name ({known}) or a folder written by `graft export`")


@functools.cache
def installed_graft(name: str) -> Path:
    """Return the folder of a pretrained graft of the package, joined to the bundled bases, in float32.

    It is built in the cache ($GRAFT_CACHE or ~/.cache/graft) at its first use; each process checks its files once.
    Raises MissingExtra where the bundled weights are not installed, and ModelError as pretrained_graft does.
    """
    folder = FOLDER / name
    digest = read_pretrained(folder).digest
    cached_name = f"{name}-{digest[:12]}-{CONVERSION}"

    def write(out: Path) -> None:
        model, processor = pretrained_graft(folder, audio_base=str(bundled_whisper()), text_base=str(bundled_qwen2vl()))
        model.save_pretrained(out)
        processor.save_pretrained(out)

    return cached_folder(cached_name) or write_cached(cached_name, write, {name: digest})


def read_pretrained(folder: Path) -> Pretrained:
    """Read pretrained.json. Raises ModelError where it is broken or of another format's version."""
    path = folder / SETTINGS_FILE
    try:
        found = json.loads(path.read_text())
        if (version := found.pop("format")) != FORMAT:
            raise ModelError(
                f"{path} has format {version}, this graft reads {FORMAT}: upgrade graft, or export it again"
            )
        adapters = found.pop("adapters")
        return Pretrained(**found, adapters=adapters and LoraSettings(**adapters))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} can't be read ({error}): fetch or export it again") from error


def read_tensors(folder: Path, pretrained: Pretrained) -> dict[str, Tensor]:
    """Read all shards' tensors in float32. Raises ModelError where their digest is not pretrained.json's."""
    state: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob(WEIGHTS.format(suffix="*"))):
            state |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} can't be read ({error}): fetch or export it again") from error
    if state_digest(state) != pretrained.digest:
        raise ModelError(f"{folder}: its adapter*.safetensors do not hold what was exported: fetch or export it again")
    return {name: tensor.float() for name, tensor in state.items()}


def write_pretrained(folder: Path, pretrained: Pretrained, state: Mapping[str, Tensor], *, shard_bytes: int) -> None:
    """Write pretrained.json and the tensors, in files of at most `shard_bytes` bytes.

    Raises ModelError where a tensor is larger than that.
    """
    room = shard_bytes - HEADER_BYTES * len(state)
    largest = max(state, key=lambda name: state[name].nbytes)
    if state[largest].nbytes > room:
        needed = math.ceil((state[largest].nbytes + HEADER_BYTES * len(state)) / 1e4) / 100
        raise ModelError(
            f"{largest} does not fit into a shard of {shard_bytes / 1e6:g} MB: make it {needed} MB or more"
        )
    save_torch_state_dict(dict(state), folder, filename_pattern=WEIGHTS, max_shard_size=room)
    (folder / SETTINGS_FILE).write_text(json.dumps({"format": FORMAT, **asdict(pretrained)}, indent=2) + "\n")


def audio_token_rows(graft: str, config: AnyGraftConfig) -> Tensor:
    """Read the embeddings of a graft's audio tokens (3, hidden_size); no other weights are read."""
    for path in weight_files(graft):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                if name.endswith("embed_tokens.weight"):
                    rows = file.get_slice(name)
                    return torch.cat([rows[index : index + 1] for index in _audio_ids(config)])
    raise ModelError(f"{graft} holds no embed_tokens.weight: build it again")


def pretrained_graft(
    folder: Path, *, audio_base: str, text_base: str, dtype: torch.dtype | None = None
) -> tuple[AnyGraft, GraftProcessor]:
    """Join two bases, load the trained part in `folder` and merge its adapters in float32.

    The result has `dtype`, by default the text base's. Raises ModelError where the bases are not those that the part
    was trained on.
    """
    pretrained = read_pretrained(folder)
    state = read_tensors(folder, pretrained)
    model, processor = build_graft(audio_base, text_base, dtype=torch.float32 if dtype else None, **pretrained.settings)
    for part, base in {"audio": audio_base, "text": text_base}.items():
        wanted, found = pretrained.base_digests[part], (model.config.base_digests or {}).get(part)
        if wanted != found:
            raise ModelError(
                f"{folder} was trained on another {part} base than {base} ({wanted}, found {found}): "
                f"give {part}_base={getattr(pretrained, f'{part}_base')}"
            )
    dtype = dtype or model.dtype
    model.float()
    try:
        model.audio_projector.load_state_dict(_projector_state(state))
        embeddings: Any = model.get_input_embeddings()
        embeddings.weight.data[_audio_ids(model.config)] = state[AUDIO_TOKENS]
    except (KeyError, RuntimeError) as error:
        raise ModelError(
            f"{folder} does not fit this graft ({str(error).splitlines()[-1].strip()}): export it again"
        ) from error
    check_projector(model.audio_projector.state_dict(), source=str(folder))
    if pretrained.onto == "nf4":
        round_to_nf4(model)
    if pretrained.adapters:
        add_adapters(model, pretrained.adapters)
        adapters = {name: tensor for name, tensor in state.items() if ".lora_" in name}
        load_adapters(model, adapters, source=str(folder))
        merge_adapters(model)
    for parameter in model.parameters():  # buffers are left out: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    for one in (model.config, processor):
        one.trained_styles, one.trained_context = list(pretrained.trained_styles), pretrained.trained_context
        one.trained_languages, one.tokens_per_s = list(pretrained.trained_languages), pretrained.tokens_per_s
    return model, processor


def save_trained_parts(source: Path, config: AnyGraftConfig, folder: Path) -> None:
    """Write a trained part in the files of a stage's output: projector.safetensors and PEFT's files of adapters."""
    pretrained = read_pretrained(source)
    state = read_tensors(source, pretrained)
    write_projector(_projector_state(state), config, folder)
    if pretrained.adapters:
        save_adapters(state, pretrained.adapters, folder)


def _projector_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PROJECTOR): tensor for name, tensor in state.items() if name.startswith(PROJECTOR)}


def _audio_ids(config: AnyGraftConfig) -> list[int]:
    return [config.audio_token_id, config.audio_start_token_id, config.audio_end_token_id]
