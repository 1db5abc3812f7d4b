"""Hold the keys and values of the running rows in slots of one KV cache, and take decode steps over them.

    prompts -> prefill, in a cache of its own -> join: a slot for each row -> step, step, ...
        -> keep: rows leave, and the last rows move into the gaps

Memory is allocated once. The first slots are taken, the rest are free. A row's tokens fill its slot from the first
column on, so that a token's column is its position, and rows join and leave at any time without moving the tokens of
others. A step writes nothing but the column of its tokens, so that a step that failed can be repeated.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from graft.inference.engines.cuda_graphs import StepGraphs
from graft.inference.engines.protocol import EngineRequest
from graft.processor import pad_prompts

# Slots grow and shrink by this many columns, so that few shapes occur.
COLUMNS = 128

# Writes a layer's keys and values of a step's tokens, as transformers calls a cache: keys, values and the layer's
# index -> all keys and values of the rows' slots.
Update: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


def round_up_columns(length: int) -> int:
    """Return the number of columns of a slot that holds `length` tokens."""
    return -(-length // COLUMNS) * COLUMNS


class SlotDecoder(ABC):
    """Reads prompts and takes decode steps with a model whose rows share a KV cache; `reserve` gives it memory.

    With `graphs`, by default on CUDA, steps are CUDA graphs over rounded numbers of slots and columns; on a CPU they
    have the same shapes, but run without a graph. Ids in the generation config's `suppress_tokens` are never to be
    chosen (`suppressed_ids`), those in `begin_suppress_tokens` not as the first token (`first_suppressed_ids`).
    """

    # Most tokens of a prompt and its answer; None where the model states no limit.
    max_length: int | None = None

    def __init__(self, model: Any, slots: "Slots", *, pad_id: int, graphs: bool | None = None) -> None:
        self.device: torch.device = model.device
        self.slots = slots
        self._model = model.eval()
        self._pad_id = pad_id
        self._tokens = 0
        use_graphs = self.device.type == "cuda" if graphs is None else graphs
        self._steps = StepGraphs(self._forward, self.device) if use_graphs else None
        settings = model.generation_config
        suppressed = settings.suppress_tokens or []
        options: dict[str, Any] = {"dtype": torch.long, "device": self.device}
        self.suppressed_ids = torch.tensor(suppressed, **options)
        self.first_suppressed_ids = torch.tensor([*suppressed, *(settings.begin_suppress_tokens or [])], **options)

    def reserve(self, tokens: int) -> None:
        """Allocate memory for at least `tokens` tokens, windows included; no row may hold a slot then."""
        if tokens > self._tokens:
            if self._steps:
                self._steps.clear()
            self.slots.allocate(tokens)
            self._tokens = tokens

    @abstractmethod
    def prefill(self, requests: Sequence[EngineRequest]) -> tuple[Any, Tensor]:
        """Encode the clips and read the prompts.

        Returns the prompts' cache, padded on the left, and the logits (rows, vocabulary) of the next tokens.
        """

    @abstractmethod
    def join(self, cache: Any, lengths: Sequence[int]) -> None:
        """Move prompts of these lengths from the cache of `prefill` into the next free slots."""

    def step(self, ids: Sequence[int], positions: Sequence[int], *, first: int = 0) -> Tensor:
        """Append a token to each row from slot `first` on, at its position.

        Returns the logits (rows, vocabulary) of the next tokens.
        """
        inputs = torch.tensor([ids, positions]).to(self.device)
        if self._steps and len(ids) == self.slots.taken:  # all later slots are free: a graph may write there
            return self._steps(inputs, columns=self.slots.columns, most_rows=self.slots.count)
        return self._forward(inputs, first)

    @abstractmethod
    def _read_tokens(self, ids: Tensor, positions: Tensor, mask: Tensor, update: Update, slots: slice) -> Tensor:
        """Run the model on a token of each row in these slots: ids and positions (rows, 1), mask (rows, 1, 1, columns).

        Returns the logits (rows, vocabulary) of the next tokens.
        """

    def _pad_prompts(self, requests: Sequence[EngineRequest]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ids, the attention mask and the positions of prompts with the prefixes of their answers.

        They are padded on the left: (rows, length) each.
        """
        rows = [[*request.prompt_ids, *request.prefix_ids] for request in requests]
        ids, mask = (torch.from_numpy(array).to(self.device) for array in pad_prompts(rows, self._pad_id))
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # a prompt's first token is at 0, whatever the padding
        return ids, mask, positions

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

        return self._read_tokens(ids, positions, mask, update, slots)


class Slots:
    """Slots in flat memory, viewed as (slots, heads, columns, width): for each layer its keys, then its values.

    There are as many slots as the memory holds with the present number of columns. With a `window`, each slot also
    holds the keys and values of so many states of an encoder, in `windows` (slots, heads, window, width); no slot then
    grows beyond `max_length` tokens.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        window: int = 0,
        max_length: int = 0,
    ) -> None:
        self.window = window
        self._token_shape = (heads, width)
        self._memory_count = 2 * layers
        self._most_columns = round_up_columns(max_length)
        self._options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.columns, self.taken = COLUMNS, 0
        self._tokens = self._window_count = 0
        self.views: list[Tensor] = []
        self.windows: list[Tensor] = []

    @property
    def count(self) -> int:
        """Number of slots, taken or free."""
        count = self._tokens // self.columns
        return min(count, self._window_count) if self.window else count

    def allocate(self, tokens: int) -> None:
        """Replace the memory by one of `tokens` columns over all slots, windows included."""
        self._memory: list[Tensor] = []
        self._tokens, self.views, self.windows = 0, [], []  # the old memory is freed before more is allocated
        if self.window:
            self._window_count = tokens // (self.window + COLUMNS)  # as many rows as can be admitted
            tokens = self._window_count * self._most_columns
        heads, width = self._token_shape
        size = tokens * heads * width
        self._memory = [torch.empty(size, **self._options) for _ in range(self._memory_count)]
        self._spare = torch.empty(size, **self._options)  # with it, `fit` allocates nothing and cannot fail halfway
        if self.window:
            shape = (self._window_count, heads, self.window, width)
            self.windows = [torch.empty(shape, **self._options) for _ in range(self._memory_count)]
        self._tokens = tokens
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

    def join(self, layers: Sequence[Any], lengths: Sequence[int], window_layers: Sequence[Any] = ()) -> None:
        """Copy prompts of these lengths into the next free slots, which must have enough columns.

        `layers` are those of the prompts' cache, `window_layers` those of the encoder's states; they have `keys` and
        `values`.
        """
        longest = max(lengths)
        device = self._options["device"]
        # In the prompts' cache rows are padded on the left; in a slot the last token also fills the columns after it.
        padding = longest - torch.tensor(lengths, device=device)
        # (rows, columns): the column of the prompts' cache that each column of a slot is filled from
        columns = (torch.arange(self.columns, device=device) + padding[:, None]).clamp(max=longest - 1)
        new = slice(self.taken, self.taken + len(lengths))
        for index, view in enumerate(self.views):
            source = _keys_or_values(layers, index)  # (rows, heads, longest, width)
            view[new] = torch.take_along_dim(source, columns[:, None, :, None], dim=2)
        for index, view in enumerate(self.windows):
            view[new] = _keys_or_values(window_layers, index)  # (rows, heads, window, width)
        self.taken = new.stop

    def keep(self, kept: Sequence[int]) -> list[int]:
        """Free all slots but these; returns, for each slot that is taken afterwards, the slot its row was in before."""
        order = list(range(len(kept)))
        gaps = sorted(set(order) - set(kept))
        last = [slot for slot in kept if slot >= len(kept)]
        if gaps:
            source, target = torch.tensor([last, gaps], device=self._options["device"])
            for view in (*self.views, *self.windows):
                view[target] = view[source]
        for gap, slot in zip(gaps, last, strict=True):
            order[gap] = slot
        self.taken = len(kept)
        return order

    def _view(self, memory: Tensor) -> Tensor:
        heads, width = self._token_shape
        return memory[: self.count * self.columns * heads * width].view(self.count, heads, self.columns, width)


def _keys_or_values(layers: Sequence[Any], index: int) -> Tensor:
    """Return what the view at `index` holds: a layer's keys, then its values."""
    return layers[index // 2].values if index % 2 else layers[index // 2].keys
