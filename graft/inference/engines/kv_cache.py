"""Hold the keys and values of the running rows in slots of one KV cache, and take decode steps over them.

    prompts -> prefill, in a cache of its own -> join: a slot for each row -> step, step, ...
        -> keep: rows leave, and the last rows move into the gaps

Memory is allocated once. The first slots are taken, the rest are free. A row's tokens fill its slot from the first
column on, so that a token's column is its position, and rows join and leave at any time without moving the tokens of
others. A step writes nothing but the column of its tokens, so that a step that failed can be repeated.
"""

from collections.abc import Sequence
from types import SimpleNamespace
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

# Slots grow and shrink by this many columns, so that few shapes occur.
COLUMNS = 128
# Name under which `_attend` is registered with transformers.
ATTENTION = "graft_grouped_queries"


def round_up_columns(length: int) -> int:
    """Return the number of columns of a slot that holds `length` tokens."""
    return -(-length // COLUMNS) * COLUMNS


class SlotDecoder:
    """Reads prompts and takes decode steps with a model whose rows share a KV cache of `tokens` columns over all slots.

    With `graphs`, steps are CUDA graphs over rounded numbers of slots and columns; on a CPU they have the same shapes,
    but run without a graph. The model's attention is replaced by one that gives the same answers faster.
    """

    def __init__(self, model: GraftForConditionalGeneration, *, pad_id: int, tokens: int, graphs: bool) -> None:
        model.set_attn_implementation({"text_config": ATTENTION})
        self._model = model.eval()
        self._pad_id = pad_id
        self.slots = Slots(model.config.get_text_config(), device=model.device, dtype=model.dtype)
        self._steps = StepGraphs(self._forward, model.device) if graphs else None
        self.reserve(tokens)

    def reserve(self, tokens: int) -> None:
        """Allocate memory for at least `tokens` tokens; no row may hold a slot then."""
        if tokens > self.slots.tokens:
            if self._steps:
                self._steps.clear()
            self.slots.allocate(tokens)

    def prefill(self, requests: Sequence[EngineRequest]) -> tuple[DynamicCache, Tensor]:
        """Encode the clips and read the prompts.

        Returns the prompts' cache, padded on the left, and the logits (rows, vocabulary) of the next tokens.
        """
        device = self._model.device
        # (rows, length) each
        ids, mask = map(torch.from_numpy, pad_prompts([request.prompt_ids for request in requests], self._pad_id))
        audio = collate_features([request.features for request in requests])
        inputs = {"input_ids": ids, **{name: torch.from_numpy(array) for name, array in audio.items()}}
        embeddings = self._model.embed(**{name: tensor.to(device) for name, tensor in inputs.items()})
        cache = DynamicCache(config=self._model.config.get_text_config())
        mask = mask.to(device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # a prompt's first token is at 0, whatever the padding
        return cache, self._read(embeddings, mask, positions, cache)

    def step(self, ids: Sequence[int], positions: Sequence[int], *, first: int = 0) -> Tensor:
        """Append a token to each row from slot `first` on, at its position.

        Returns the logits (rows, vocabulary) of the next tokens.
        """
        inputs = torch.tensor([ids, positions]).to(self._model.device)
        if self._steps and len(ids) == self.slots.taken:  # all later slots are free: a graph may write there
            return self._steps(inputs, columns=self.slots.columns, most_rows=self.slots.count)
        return self._forward(inputs, first)

    def _forward(self, inputs: Tensor, first: int = 0) -> Tensor:
        ids, positions = inputs[..., None]  # (rows, 1) each
        columns = torch.arange(self.slots.columns, device=ids.device)
        mask = torch.zeros(len(ids), 1, 1, len(columns), dtype=self._model.dtype, device=ids.device)
        mask.masked_fill_(columns > positions[:, None, None], float("-inf"))  # a row sees its own tokens alone
        slots = slice(first, first + len(ids))

        def update(keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            """Write a layer's new tokens to their columns (rows, 1) of the slots; returns the slots."""
            targets = positions[:, :, None, None].expand_as(keys)  # (rows, heads, 1, width)
            all_keys, all_values = (view[slots] for view in self.slots.views[2 * layer : 2 * layer + 2])
            return all_keys.scatter_(2, targets, keys), all_values.scatter_(2, targets, values)

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


class Slots:
    """Slots in flat memory, viewed as (slots, heads, columns, width): for each layer its keys, then its values.

    There are as many slots as the memory holds with the present number of columns.
    """

    def __init__(self, config: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._token_shape = (config.num_key_value_heads, width)
        self._memory_count = 2 * config.num_hidden_layers
        self._options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tokens, self.columns, self.taken = 0, COLUMNS, 0
        self.views: list[Tensor] = []

    @property
    def count(self) -> int:
        """Number of slots, taken or free."""
        return self.tokens // self.columns

    def allocate(self, tokens: int) -> None:
        """Replace the memory by one of `tokens` columns over all slots."""
        self._memory: list[Tensor] = []
        self.tokens, self.views = 0, []  # the old memory is freed before more is allocated
        size = tokens * self._token_shape[0] * self._token_shape[1]
        self._memory = [torch.empty(size, **self._options) for _ in range(self._memory_count)]
        self._spare = torch.empty(size, **self._options)  # with it, `fit` allocates nothing and cannot fail halfway
        self.tokens = tokens
        self.views = [self._view(memory) for memory in self._memory]

    def fit(self, length: int) -> None:
        """Give every slot the columns for `length` tokens: those of the longest row that runs or is about to join."""
        columns = round_up_columns(length)
        if columns == self.columns:
            return
        kept = min(columns, self.columns)
        self.columns = columns
        for index, memory in enumerate(self._memory):
            rows = self.views[index][: self.taken, :, :kept]
            copies = self._spare[: rows.numel()].view(rows.shape).copy_(rows)
            self.views[index] = self._view(memory)
            self.views[index][: self.taken, :, :kept] = copies
            self.views[index][: self.taken, :, kept:] = 0  # masked columns must be finite too: 0 x inf is nan

    def join(self, cache: DynamicCache, lengths: Sequence[int]) -> None:
        """Copy prompts of these lengths from their cache into the next free slots, which must have enough columns."""
        longest = max(lengths)
        device = self._options["device"]
        # In the prompts' cache rows are padded on the left; in a slot the last token also fills the columns after it.
        padding = longest - torch.tensor(lengths, device=device)
        # (rows, columns): the column of the prompts' cache that each column of a slot is filled from
        columns = (torch.arange(self.columns, device=device) + padding[:, None]).clamp(max=longest - 1)
        new = slice(self.taken, self.taken + len(lengths))
        for index, view in enumerate(self.views):
            layer: Any = cache.layers[index // 2]
            source = layer.values if index % 2 else layer.keys  # (rows, heads, longest, width)
            view[new] = torch.take_along_dim(source, columns[:, None, :, None], dim=2)
        self.taken = new.stop

    def keep(self, kept: Sequence[int]) -> list[int]:
        """Free all slots but these; returns, for each slot that is taken afterwards, the slot its row was in before."""
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
        return memory[: self.count * self.columns * heads * width].view(self.count, heads, self.columns, width)


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
