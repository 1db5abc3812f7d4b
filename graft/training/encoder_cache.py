"""Encoder outputs kept on disk, so that a frozen encoder hears each clip once however many epochs follow.

An entry's name is a digest of the audio file's bytes; its folder's is one of all that turns those bytes into states: the encoder's weights
and precision, how many of its states make a token, and the features. A change of any of them begins another folder.
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

from graft.model.configuration import GraftConfig, audio_token_count
from graft.model.ctc import CtcPrealignment
from graft.model.encoder import encode_audio
from graft.model.modeling import GraftForConditionalGeneration
from graft.storage.atomic import atomic_file


@dataclass(frozen=True, eq=False)
class Encoded:
    """A clip as the encoder left it: states (tokens, d_model) in the encoder's precision, and the mel frames that were heard."""

    states: Tensor
    frame_count: int


@dataclass(frozen=True)
class EncoderCache:
    """A folder of encoded clips, one file each; any number of processes may read and write it at once."""

    folder: Path

    @staticmethod
    def key(audio: bytes) -> str:
        """Name an audio file's entry."""
        return hashlib.sha256(audio).hexdigest()

    def get(self, key: str) -> Encoded | None:
        """Read an entry; None where it is missing or not readable."""
        try:
            with safe_open(self._path(key), framework="pt") as file:
                return Encoded(file.get_tensor("states"), int(file.metadata()["frame_count"]))
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, key: str, encoded: Encoded) -> None:
        """Write an entry, whole or not at all; one that is there already stays."""
        path = self._path(key)
        if path.exists():
            return
        with atomic_file(path, sync=False) as temporary:
            save_file(
                {"states": encoded.states.cpu().contiguous()},
                temporary,
                metadata={"frame_count": str(encoded.frame_count)},
            )

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def open_cache(folder: str | Path, config: GraftConfig, *, encoder: str, features: str, dtype: str) -> EncoderCache:
    """Open the part of a folder that belongs to a graft's encoder and features, both given by their digests, and a precision."""
    parts = (encoder, features, dtype, str(config.audio_pool), config.audio_context, str(config.audio_margin_s))
    return EncoderCache(Path(folder).resolve() / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16])


class CachingEncoder:
    """Gives a batch's clips their states: those that were found in the cache, and for the others what the encoder makes of them."""

    def __init__(self, model: GraftForConditionalGeneration | CtcPrealignment, cache: EncoderCache):
        self.model, self.cache = model, cache
        self._writing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-encoder-cache")
        self._writes: list[Future[None]] = []

    @torch.no_grad()
    def __call__(
        self, input_features: Tensor | None, frame_counts: Tensor, keys: Sequence[str], found: Mapping[int, Tensor]
    ) -> Tensor:
        """Encode the clips whose places are not in `found` and write them down under their keys ("" has none).

        input_features (missing clips, mels, frames); frame_counts (clips,); returns (tokens of all clips, d_model). Waits for what the
        batch before left to write, and raises OSError where that went wrong.
        """
        self._settle()
        missing = [place for place in range(len(keys)) if place not in found]
        states = dict(found)
        if missing and input_features is not None:
            encoded = encode_audio(self.model.audio_tower, input_features, frame_counts[missing], self.model.config)
            for place, one in zip(missing, encoded.split(self._token_counts(frame_counts[missing])), strict=True):
                states[place] = one
                if keys[place]:
                    self._writes.append(
                        self._writing.submit(self.cache.put, keys[place], Encoded(one, int(frame_counts[place])))
                    )
        return torch.cat([states[place] for place in range(len(keys))])

    def close(self) -> None:
        """Return when all is written. Raises OSError where that went wrong."""
        self._writing.shutdown()
        self._settle()

    def _settle(self) -> None:
        for write in self._writes:
            write.result()
        self._writes.clear()

    def _token_counts(self, frame_counts: Tensor) -> list[int]:
        config = self.model.config
        return [
            audio_token_count(count, pool=config.audio_pool, context=config.audio_context)
            for count in frame_counts.tolist()
        ]
