"""CUDA graphs of decode steps: a step of a large model is a thousand kernels, and to launch them takes longer than to run them."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StepGraphs:
    """Steps over the first slots as CUDA graphs, one for each number of slots and columns, captured when it is first needed."""

    def __init__(self, forward: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._is_capturing = device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        """Forget the graphs: they know the memory by its address."""
        self._graphs: dict[tuple[int, int], tuple[Tensor, Callable[[], Tensor]]] = {}
        self._logits: dict[
            int, Tensor
        ] = {}  # (rows, vocabulary), shared by the graphs of as many rows: those are large
        self._pool: Any = None

    def __call__(self, inputs: Tensor, *, columns: int, most_rows: int) -> Tensor:
        """Take a step with ids and positions (2, rows), and with free slots up to a number that recurs; returns logits (rows, ...)."""
        count = inputs.shape[1]
        rows = min(_recurring(count), most_rows)
        if (rows, columns) not in self._graphs:
            self._graphs[rows, columns] = self._capture(inputs, rows)
        places, replay = self._graphs[rows, columns]
        places[:, :count] = inputs
        return replay()[:count]

    def _capture(self, inputs: Tensor, rows: int) -> tuple[Tensor, Callable[[], Tensor]]:
        """A graph's inputs and what runs it. The step is taken once before: it writes to the slots, so with the inputs that it is for."""
        places = torch.zeros(2, rows, dtype=torch.long, device=self._device)
        places[:, : inputs.shape[1]] = inputs
        if self._is_capturing:
            try:
                return places, self._captured(places)
            except RuntimeError as error:
                self._is_capturing = False
                warnings.warn(f"decoding without CUDA graphs, which is slower: {error}", stacklevel=1)
        self._forward(places)
        return places, lambda: self._forward(places)

    def _captured(self, places: Tensor) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            first = self._forward(places)  # what libraries set up at their first call must not be captured
        torch.cuda.current_stream(self._device).wait_stream(stream)
        logits = self._logits.setdefault(len(first), torch.empty_like(first))
        del first
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits.copy_(self._forward(places))

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def _recurring(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power
