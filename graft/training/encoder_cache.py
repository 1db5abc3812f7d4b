"""Cache a frozen encoder's outputs on disk, so that each clip is encoded once for any number of epochs.

An entry is named by the digest of the audio file's bytes. Its folder is named by the digest of all that turns those
bytes into states: the encoder's weights and precision, its pooling and context, and the features.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graft.model.configuration import AnyGraftConfig
from graft.model.ctc import CtcPrealignment
from graft.model.encoder import encode_audio, projected_counts
from graft.model.modeling import AnyGraft
from graft.storage.atomic import atomic_file


@dataclass(frozen=True, eq=False)
class EncodedClip:
    """A clip's states for the projector (states, d_model) in the encoder's precision, and its number of mel frames."""

    states: Tensor
    frame_count: int


@dataclass(frozen=True)
class EncoderCache:
    """A folder with one file per encoded clip; any number of processes may read and write it at once."""

    folder: Path

    @staticmethod
    def key(audio: bytes) -> str:
        """Compute the key of an audio file's entry."""
        return hashlib.sha256(audio).hexdigest()

    def get(self, key: str) -> EncodedClip | None:
        """Read an entry; return None where it is missing or broken."""
        try:
            with safe_open(self._path(key), framework="pt") as file:
                return EncodedClip(file.get_tensor("states"), int(file.metadata()["frame_count"]))
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, key: str, encoded: EncodedClip) -> None:
        """Write an entry atomically; an existing entry is kept."""
        if not (path := self._path(key)).exists():
            with atomic_file(path, sync=False) as temporary:
                frame_count = str(encoded.frame_count)
                save_file({"states": encoded.states.cpu().contiguous()}, temporary, {"frame_count": frame_count})

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def open_cache(folder: str | Path, config: AnyGraftConfig, *, encoder: str, features: str, dtype: str) -> EncoderCache:
    """Open the subfolder that belongs to an encoder and features, given by their digests, and a precision."""
    parts = (encoder, features, dtype, str(config.averaged_states), config.audio_context, str(config.audio_margin_s))
    return EncoderCache(Path(folder).resolve() / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16])


class CachingEncoder:
    """Encodes the clips of a batch that were not found in the cache, and adds them to it."""

    def __init__(self, model: AnyGraft | CtcPrealignment, cache: EncoderCache):
        self.model, self.cache = model, cache
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-encoder-cache")
        self._writes: list[Future[None]] = []

    @torch.no_grad()
    def __call__(
        self, input_features: Tensor | None, frame_counts: Tensor, keys: Sequence[str], found: Mapping[int, Tensor]
    ) -> Tensor:
        """Return the states of all clips (tokens of all clips, d_model).

        Args:
            input_features: log-mels of the clips that were not found (missing clips, mels, frames).
            frame_counts: number of mel frames of every clip (clips,).
            keys: cache key of every clip; an empty one keeps the clip out of the cache.
            found: cached states (tokens, d_model) by the clip's index.

        Waits until the batch before is written, and raises OSError where that failed.
        """
        self._finish_writes()
        missing = [index for index in range(len(keys)) if index not in found]
        states = dict(found)
        if missing and input_features is not None:
            missing_counts, config = frame_counts[missing], self.model.config
            encoded = encode_audio(self.model.audio_tower, input_features, missing_counts, config)
            for index, one in zip(missing, encoded.split(projected_counts(missing_counts, config)), strict=True):
                states[index] = one  # (tokens, d_model)
                if keys[index]:
                    entry = EncodedClip(one, int(frame_counts[index]))
                    self._writes.append(self._pool.submit(self.cache.put, keys[index], entry))
        return torch.cat([states[index] for index in range(len(keys))])

    def close(self) -> None:
        """Wait until all entries are written. Raises OSError where that failed."""
        self._pool.shutdown()
        self._finish_writes()

    def _finish_writes(self) -> None:
        for write in self._writes:
            write.result()
        self._writes.clear()
