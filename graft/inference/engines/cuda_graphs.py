"""Run decode steps as CUDA graphs.

A step of a large model is a thousand kernels, which take longer to launch than to run.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StepGraphs:
    """Decode steps over the first slots as CUDA graphs, one for each number of slots and columns, captured when due."""

    def __init__(self, forward: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._is_capturing = device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        """Drop the graphs: they hold the addresses of the cache's memory."""
        self._graphs: dict[tuple[int, int], tuple[Tensor, Callable[[], Tensor]]] = {}
        # (rows, vocabulary) by rows, shared by all graphs of as many rows, because logits are large
        self._logits: dict[int, Tensor] = {}
        self._pool: Any = None

    def __call__(self, inputs: Tensor, *, columns: int, most_rows: int) -> Tensor:
        """Take a step with ids and positions (2, rows); returns logits (rows, ...).

        The step runs over free slots too, up to the next number of rows that graphs are captured for.
        """
        count = inputs.shape[1]
        # Rows are rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., so that few graphs are captured.
        power = 1 << (count - 1).bit_length()
        rows = min(power * 3 // 4 if count <= power * 3 // 4 else power, most_rows)
        if (rows, columns) not in self._graphs:
            self._graphs[rows, columns] = self._capture(inputs, rows)
        graph_inputs, replay = self._graphs[rows, columns]
        graph_inputs[:, :count] = inputs
        return replay()[:count]

    def _capture(self, inputs: Tensor, rows: int) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return a graph's inputs and the function that runs it.

        Capturing takes the step once, which writes to the slots, so it is given the inputs of the step that is due.
        """
        graph_inputs = torch.zeros(2, rows, dtype=torch.long, device=self._device)
        graph_inputs[:, : inputs.shape[1]] = inputs
        if self._is_capturing:
            try:
                return graph_inputs, self._capture_graph(graph_inputs)
            except RuntimeError as error:
                self._is_capturing = False
                warnings.warn(f"decoding without CUDA graphs, which is slower: {error}", stacklevel=1)
        self._forward(graph_inputs)
        return graph_inputs, lambda: self._forward(graph_inputs)

    def _capture_graph(self, graph_inputs: Tensor) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            first = self._forward(graph_inputs)  # what libraries set up at their first call must not be captured
        torch.cuda.current_stream(self._device).wait_stream(stream)
        logits = self._logits.setdefault(len(first), torch.empty_like(first))
        del first
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits.copy_(self._forward(graph_inputs))

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
