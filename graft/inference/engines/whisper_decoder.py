"""Take decode steps with a Whisper, whose rows hold the encoder's states of a 30 s window beside their own tokens."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, WhisperForConditionalGeneration

from graft.inference.engines.kv_cache import SlotDecoder, Slots, Update
from graft.inference.engines.protocol import EngineRequest
from graft.model.configuration import WINDOW_FRAMES
from graft.model.encoder import pad_with_silence
from graft.processor import collate_features


class WhisperDecoder(SlotDecoder):
    """Decodes with a Whisper checkpoint. A window's keys and values are computed once, when its row joins."""

    def __init__(self, model: WhisperForConditionalGeneration, *, pad_id: int, graphs: bool | None = None) -> None:
        config = model.config
        self.max_length = config.max_target_positions
        slots = Slots(
            layers=config.decoder_layers,
            heads=config.decoder_attention_heads,
            width=config.d_model // config.decoder_attention_heads,
            device=model.device,
            dtype=model.dtype,
            window=config.max_source_positions,
            max_length=config.max_target_positions,
        )
        super().__init__(model, slots, pad_id=pad_id, graphs=graphs)

    def prefill(self, requests: Sequence[EngineRequest]) -> tuple[EncoderDecoderCache, Tensor]:
        """See SlotDecoder."""
        ids, mask, positions = self._pad_prompts(requests)
        audio = collate_features([request.features for request in requests])
        mel, frame_counts = (torch.from_numpy(audio[name]) for name in ("input_features", "audio_frame_counts"))
        mel = pad_with_silence(mel, frame_counts, WINDOW_FRAMES)  # (rows, mels, WINDOW_FRAMES)
        states = self._model.get_encoder()(mel.to(self.device, self._model.dtype)).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return cache, self._read(ids, mask, positions, states, cache)

    def join(self, cache: EncoderDecoderCache, lengths: Sequence[int]) -> None:
        """See SlotDecoder."""
        self.slots.join(cache.self_attention_cache.layers, lengths, cache.cross_attention_cache.layers)

    def _read_tokens(self, ids: Tensor, positions: Tensor, mask: Tensor, update: Update, slots: slice) -> Tensor:
        cache = _SlotCache(update, [window[slots] for window in self.slots.windows])
        return self._read(ids, mask, positions, self.slots.windows[0], cache)

    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor, states: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """Read tokens (rows, length); the states (rows, window, d_model) are not looked at where the cache has them."""
        output = self._model.get_decoder()(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            encoder_hidden_states=states,
            past_key_values=cache,
            use_cache=True,
        )
        return self._model.proj_out(output.last_hidden_state[:, -1])


class _SlotCache(EncoderDecoderCache):
    """The slots of a step as the decoder's layers use a cache: the windows are complete, the tokens are written."""

    def __init__(self, update: Update, windows: Sequence[Tensor]) -> None:
        pairs = zip(windows[::2], windows[1::2], strict=True)  # each layer's keys and values
        layers = [SimpleNamespace(keys=keys, values=values) for keys, values in pairs]
        self.self_attention_cache: Any = SimpleNamespace(update=update)
        self.cross_attention_cache: Any = SimpleNamespace(layers=layers)
        self.is_updated = dict.fromkeys(range(len(layers)), True)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return no length: positions and mask are given."""
        return 0
