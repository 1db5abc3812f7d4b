"""Merge a stage's projector and adapters into its graft, tensor by tensor, in the memory of one shard.

files of the graft -> each tensor + its adapter's B A, in float32 -> the merged graft's files, one after the other
"""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from graft.checkpoints.build import reading
from graft.checkpoints.loading import base_checkpoint, check_graft, configure_as_trained, open_processor
from graft.checkpoints.lora import (
    ADAPTER_FILES,
    LORA_TARGETS,
    PEFT_PREFIX,
    attach_adapters,
    has_adapters,
    round_matrix_to_nf4,
)
from graft.checkpoints.projector_file import read_projector, weight_files
from graft.errors import ModelError
from graft.model.configuration import AnyGraftConfig, read_graft_config
from graft.model.modeling import graft_class

PROJECTOR = "audio_projector."
SHARD_BYTES = 5 * 10**9


def write_merged(
    stage: str | Path, out: Path, *, dtype: torch.dtype, onto_nf4: bool, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the whole graft of a stage's output, with its projector and adapters merged, into the folder `out`.

    The sums are computed in float32 and written in `dtype`, in files of at most `shard_bytes` bytes, of which one at a
    time is in memory. With `onto_nf4` the adapters are added to the values that NF4 rounds the language model to.
    Raises ModelError where the graft lacks tensors, and where projector or adapters do not fit it.
    """
    weights = StageWeights(stage)
    graft, config, processor = weights.graft, weights.config, open_processor(stage)

    def merged(name: str) -> Tensor:
        tensor = weights.before(name)
        if onto_nf4 and re.fullmatch(LORA_TARGETS, name.removesuffix(".weight")):
            tensor = round_matrix_to_nf4(tensor.float())
        return weights.after(name, tensor)

    _write_shards(out, _sizes(weights.places, dtype), merged, dtype=dtype, shard_bytes=shard_bytes)
    configure_as_trained(config, processor)
    config.dtype = dtype
    config.save_pretrained(out)
    with reading(graft):
        GenerationConfig.from_pretrained(graft).save_pretrained(out)
    processor.save_pretrained(out)


class StageWeights:
    """The tensors of the graft that a stage was trained on, and what the stage makes of them, one at a time.

    Raises ModelError where the graft lacks tensors, and where projector or adapters do not fit it.
    """

    def __init__(self, stage: str | Path) -> None:
        check_graft(stage)
        self.graft = base_checkpoint(stage)
        self.config = read_graft_config(self.graft)
        self.places = _tensor_files(self.graft)
        """File of each tensor of the graft, by its name."""
        self._adapters = _Adapters(Path(stage), *_check_adapters(stage, self.config)) if has_adapters(stage) else None
        _check_whole(self.graft, self.config, self.places)
        self._projector = read_projector(stage, self.config)

    def before(self, name: str) -> Tensor:
        """Read a tensor of the graft."""
        with safe_open(
            self.places[name], framework="pt"
        ) as file:  # opened again each time, it leaves no pages in memory
            return file.get_tensor(name)

    def after(self, name: str, before: Tensor) -> Tensor:
        """Return what the stage makes of a tensor: its projector's, the sum with an adapter, or the tensor itself."""
        if name.startswith(PROJECTOR):
            return self._projector[name.removeprefix(PROJECTOR)]
        delta = self._adapters.delta(name.removesuffix(".weight")) if self._adapters else None
        return before if delta is None else before.float() + delta


@dataclass(frozen=True)
class _Adapters:
    """The adapters in a stage's output folder, read one matrix at a time."""

    folder: Path
    matrices: frozenset[str]
    scale: float

    def delta(self, matrix: str) -> Tensor | None:
        """Compute what is added to a matrix (out, in), in float32; None where it has no adapter."""
        if matrix not in self.matrices:
            return None
        with safe_open(self.folder / ADAPTER_FILES[1], framework="pt") as file:
            a, b = (file.get_tensor(f"{PEFT_PREFIX}{matrix}.lora_{part}.weight").float() for part in "AB")
        return b @ a * self.scale  # (out, r), (r, in) -> (out, in)


def _check_adapters(stage: str | Path, config: AnyGraftConfig) -> tuple[frozenset[str], float]:
    """Return the names of the adapted matrices, and the adapters' scale. Raises ModelError where they do not fit."""
    with torch.device("meta"):
        model = graft_class(config)(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        attach_adapters(model, stage)
    settings: Any = model.peft_config["default"]
    matrices = frozenset(
        name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if name.endswith(".lora_A.default.weight")
    )
    return matrices, settings.lora_alpha / settings.r


def _check_whole(graft: str, config: AnyGraftConfig, places: dict[str, Path]) -> None:
    with torch.device("meta"):
        wanted = graft_class(config)(config).state_dict().keys()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := sorted(wanted - places.keys() - tied):
        raise ModelError(f"{graft} lacks {len(missing)} tensors of a graft, {missing[0]} first: build it again")


def _tensor_files(graft: str) -> dict[str, Path]:
    """Return the file of each tensor, by its name."""
    places: dict[str, Path] = {}
    with reading(graft):
        for path in weight_files(graft):
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
    return places


def _sizes(places: dict[str, Path], dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of each tensor in `dtype`, in the order of the files."""
    sizes: dict[str, int] = {}
    for path in dict.fromkeys(places.values()):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                sizes[name] = torch.Size(file.get_slice(name).get_shape()).numel() * dtype.itemsize
    return sizes


def _write_shards(
    out: Path, sizes: dict[str, int], merged: Callable[[str], Tensor], *, dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write the tensors in `dtype`, and an index where they take several files, as transformers does."""
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    largest = max(sum(sizes[name] for name in names) for names in split.filename_to_tensors.values())
    # The shards are made in the same memory, one after the other: the allocator would keep parts of former ones.
    memory = torch.empty(largest // dtype.itemsize, dtype=dtype)
    for filename, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        start = 0
        for name in names:
            tensor = merged(name)
            shard[name] = memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
            start += tensor.numel()
        save_file(shard, out / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
