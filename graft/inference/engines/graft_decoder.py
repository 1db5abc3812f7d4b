"""Take decode steps with a graft, whose prompts hold the audio, so that a row needs only the slot of its tokens."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from graft.inference.engines.kv_cache import SlotDecoder, Slots, Update
from graft.inference.engines.protocol import EngineRequest
from graft.model.modeling import AnyGraft
from graft.processor import collate_features

# Name under which `_attend` is registered with transformers.
ATTENTION = "graft_grouped_queries"


class GraftDecoder(SlotDecoder):
    """Decodes with a graft, whose attention is replaced by one that gives the same answers faster."""

    def __init__(self, model: AnyGraft, *, pad_id: int, graphs: bool | None = None) -> None:
        model.set_attn_implementation({"text_config": ATTENTION})
        config = model.config.get_text_config()
        slots = Slots(
            layers=config.num_hidden_layers,
            heads=config.num_key_value_heads,
            width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            device=model.device,
            dtype=model.dtype,
        )
        super().__init__(model, slots, pad_id=pad_id, graphs=graphs)

    def prefill(self, requests: Sequence[EngineRequest]) -> tuple[DynamicCache, Tensor]:
        """See SlotDecoder."""
        ids, mask, positions = self._pad_prompts(requests)
        audio = collate_features([request.features for request in requests])
        clips = {name: torch.from_numpy(array).to(self.device) for name, array in audio.items()}
        cache = DynamicCache(config=self._model.config.get_text_config())
        return cache, self._read(self._model.embed(input_ids=ids, **clips), mask, positions, cache)

    def join(self, cache: DynamicCache, lengths: Sequence[int]) -> None:
        """See SlotDecoder."""
        self.slots.join(cache.layers, lengths)

    def _read_tokens(self, ids: Tensor, positions: Tensor, mask: Tensor, update: Update, slots: slice) -> Tensor:
        cache = SimpleNamespace(update=update)  # all that the layers use of a cache
        return self._read(self._model.get_input_embeddings()(ids), mask, positions, cache)

    def _read(self, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        # Explicit positions (rows, length), equal in time, height and width: those that the model works out by itself
        # depend on its last call (rope_deltas).
        output = self._model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute SDPA; in a decode step, query heads that share a key head become that head's queries.

    Keys and values so need not be repeated for each query head.
    """
    rows, _, length, width = query.shape
    if length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # (rows, heads, 1, width) -> (rows, key heads, query heads of each, width)
    queries = query.reshape(rows, key.shape[1], -1, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        queries, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, -1, width), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
