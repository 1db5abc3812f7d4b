"""The running rows' keys and values, in memory that is taken once, and the decode step over them.

    prompts -> prefill, in a cache of its own -> join: a slot for each row -> step, step, ... -> keep: the last rows move into the gaps

The first slots are taken, the rest are free. A row's tokens stand in its slot from the first column on, so a token's column is its
position, and rows may join and leave at any time without moving the others' tokens. A step changes nothing but the column of its tokens:
one that failed can be taken again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from graft.inference.engines.cuda_graphs import StepGraphs
from graft.inference.engines.protocol import EngineRequest
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import collate_features, pad_prompts

COLUMNS = 128
"""Slots grow and shrink by so many columns, so that few shapes occur."""
ATTENTION = "graft_grouped_queries"


def whole_columns(length: int) -> int:
    """The columns of a slot that holds so many tokens."""
    return -(-length // COLUMNS) * COLUMNS


class SlotDecoder:
    """Reads prompts and takes decode steps with a model whose rows share `tokens` columns, counted over all slots.

    With `graphs` steps are CUDA graphs, over numbers of slots and columns that recur; on a CPU they have the same shapes, but no graph.
    The model's attention is set to one that gives the same answers faster.
    """

    def __init__(self, model: GraftForConditionalGeneration, *, pad_id: int, tokens: int, graphs: bool) -> None:
        model.set_attn_implementation({"text_config": ATTENTION})
        self._model = model.eval()
        self._pad_id = pad_id
        self._slots = _Slots(model.config.get_text_config(), device=model.device, dtype=model.dtype)
        self._steps = StepGraphs(self._forward, model.device) if graphs else None
        self.reserve(tokens)

    def reserve(self, tokens: int) -> None:
        """Take memory for so many tokens, where there is less; no row may hold a slot then."""
        if tokens > self._slots.tokens:
            if self._steps:
                self._steps.clear()
            self._slots.allocate(tokens)

    def prefill(self, requests: Sequence[EngineRequest]) -> tuple[DynamicCache, Tensor]:
        """Encode the clips and read the prompts, padded on the left; returns their cache and the next tokens' logits (rows, vocabulary)."""
        ids, mask = (
            torch.from_numpy(part) for part in pad_prompts([request.prompt_ids for request in requests], self._pad_id)
        )
        audio = collate_features([request.features for request in requests])
        inputs = {"input_ids": ids, **{name: torch.from_numpy(array) for name, array in audio.items()}}
        embeddings = self._model.embed(**{name: tensor.to(self._model.device) for name, tensor in inputs.items()})
        cache = DynamicCache(config=self._model.config.get_text_config())
        mask = mask.to(self._model.device)
        return cache, self._read(embeddings, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), cache)

    def fit(self, length: int) -> None:
        """Give every slot the columns that a row of this length needs, no more: the longest of those that are there or about to join."""
        self._slots.fit(length)

    def join(self, cache: DynamicCache, lengths: Sequence[int]) -> None:
        """Copy prompts of these lengths from their cache into the next slots, which must have the columns."""
        self._slots.add(cache, lengths)

    def keep(self, kept: Sequence[int]) -> list[int]:
        """Free all other slots; returns, for each slot that is taken now, which one it was."""
        return self._slots.keep(kept)

    def step(self, ids: Sequence[int], positions: Sequence[int], *, first: int = 0) -> Tensor:
        """Append a token to each row from slot `first` on, at its position; returns the logits (rows, vocabulary) of the next."""
        inputs = torch.tensor([ids, positions]).to(self._model.device)
        if self._steps and len(ids) == self._slots.taken:  # the slots after these are free: a graph may write there
            return self._steps(inputs, columns=self._slots.columns, most_rows=self._slots.room)
        return self._forward(inputs, first)

    def _forward(self, inputs: Tensor, first: int = 0) -> Tensor:
        ids, positions = inputs[..., None]  # (rows, 1) each
        columns = torch.arange(self._slots.columns, device=ids.device)
        mask = torch.zeros(len(ids), 1, 1, len(columns), dtype=self._model.dtype, device=ids.device)
        mask.masked_fill_(columns > positions[:, None, None], float("-inf"))
        cache = _StepCache(self._slots.views, slice(first, first + len(ids)), positions)
        return self._read(self._model.get_input_embeddings()(ids), mask, positions, cache)

    def _read(self, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        # Explicit positions (rows, length), equal in time, height and width: the model's own would depend on its last call (rope_deltas).
        output = self._model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


class _Slots:
    """Flat memory, seen as (slots, heads, columns, width): each layer's keys, then its values. As many slots as have room."""

    def __init__(self, config: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._token_shape = (config.num_key_value_heads, width)
        self._memory_count = 2 * config.num_hidden_layers
        self._options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tokens, self.columns, self.taken = 0, COLUMNS, 0
        self.views: list[Tensor] = []

    @property
    def room(self) -> int:
        """How many slots there are."""
        return self.tokens // self.columns

    def allocate(self, tokens: int) -> None:
        self._memory: list[Tensor] = []
        self.tokens, self.views = 0, []  # freed before more is taken
        size = tokens * self._token_shape[0] * self._token_shape[1]
        self._memory = [torch.empty(size, **self._options) for _ in range(self._memory_count)]
        self._aside = torch.empty(size, **self._options)  # so that fit needs no memory, and can't fail halfway
        self.tokens = tokens
        self.views = [self._view(memory) for memory in self._memory]

    def fit(self, length: int) -> None:
        columns = whole_columns(length)
        if columns == self.columns:
            return
        kept = min(columns, self.columns)
        self.columns = columns
        for place, memory in enumerate(self._memory):
            rows = self.views[place][: self.taken, :, :kept]
            aside = self._aside[: rows.numel()].view(rows.shape).copy_(rows)
            self.views[place] = self._view(memory)
            self.views[place][: self.taken, :, :kept] = aside
            self.views[place][: self.taken, :, kept:] = 0  # what is masked must be finite all the same

    def add(self, cache: DynamicCache, lengths: Sequence[int]) -> None:
        longest = max(lengths)
        device = self._options["device"]
        # Rows are padded on the left there; here the last token also fills the columns past it.
        padding = longest - torch.tensor(lengths, device=device)
        columns = (torch.arange(self.columns, device=device) + padding[:, None]).clamp(max=longest - 1)
        new = slice(self.taken, self.taken + len(lengths))
        for place, view in enumerate(self.views):
            layer: Any = cache.layers[place // 2]
            view[new] = torch.take_along_dim(
                layer.values if place % 2 else layer.keys, columns[:, None, :, None], dim=2
            )
        self.taken = new.stop

    def keep(self, kept: Sequence[int]) -> list[int]:
        order = list(range(len(kept)))
        gaps = sorted(set(order) - set(kept))
        last = [slot for slot in kept if slot >= len(kept)]
        if gaps:
            source, target = torch.tensor([last, gaps], device=self._options["device"])
            for view in self.views:
                view[target] = view[source]
        for gap, slot in zip(gaps, last, strict=True):
            order[gap] = slot
        self.taken = len(kept)
        return order

    def _view(self, memory: Tensor) -> Tensor:
        heads, width = self._token_shape
        return memory[: self.room * self.columns * heads * width].view(self.room, heads, self.columns, width)


class _StepCache:
    """What the model's layers take for their cache in a step: some slots, and the columns (rows, 1) where the step's tokens go."""

    def __init__(self, views: Sequence[Tensor], slots: slice, positions: Tensor) -> None:
        self._views = views
        self._slots = slots
        self._positions = positions

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        columns = self._positions[:, :, None, None].expand_as(keys)  # (rows, heads, 1, width)
        all_keys, all_values = (view[self._slots] for view in self._views[2 * layer : 2 * layer + 2])
        return all_keys.scatter_(2, columns, keys), all_values.scatter_(2, columns, values)


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
    """SDPA, but a step's query heads that share a key head are that head's queries: keys and values need not be repeated for each."""
    rows, _, length, width = query.shape
    if length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    queries = query.reshape(
        rows, key.shape[1], -1, width
    )  # (rows, heads, 1, width) -> (rows, key heads, heads of each, width)
    answers = torch.nn.functional.scaled_dot_product_attention(
        queries, key, value, attn_mask=attention_mask, scale=scaling
    )
    return answers.reshape(rows, 1, -1, width), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
