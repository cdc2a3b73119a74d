"""The graphs of a decode step, captured over one set of static inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.graph_runner import StepInputs, capture_batch_sizes, padded_size
from sglang.srt.model_executor.step_function import StepFunction
from sglang.srt.model_executor.step_graph import StepGraph


class StepRunner:
    """Captures the graphs, and loads each step's batch into the inputs that they read."""

    def __init__(
        self,
        functions: Sequence[StepFunction],
        graphs: Sequence[StepGraph],
        create_inputs: Callable[[int], StepInputs],  # of a batch size
        pool: ReqToTokenPool,
    ) -> None:
        self.functions = tuple(functions)
        self.graphs = tuple(graphs)
        self.create_inputs = create_inputs
        self.pool = pool
        self.views: dict[int, StepInputs] = {}  # of the static inputs, by captured batch size
        self._batch_sizes: list[int] = []
        self.launches_need_lengths = True  # of metadata that the host refreshes before a replay
        self._loaded: torch.Tensor | None = None  # the requests that the static inputs hold

    @torch.inference_mode()
    def capture(self, max_bs: int) -> None:
        static = self.create_inputs(max_bs)
        device = static.seq_lens.device
        self._batch_sizes = capture_batch_sizes(max_bs)
        self.views = {bs: static.view(bs) for bs in self._batch_sizes}
        for function in self.functions:
            function.plan(static, self.pool, self._batch_sizes)
        self.launches_need_lengths = not all(f.backend.graph_metadata.in_graph for f in self.functions)
        # Graphs are replayed one after the other, so what one needs for itself may lie where another's was.
        memory_pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        for graph in self.graphs:
            graph.capture(self.views, device, memory_pool)

    def load(self, req_pool_indices: torch.Tensor) -> StepInputs:
        """The inputs of a step of these requests ([n], int32): the static ones of the captured size that
        holds them, with padding, or fresh ones where there is none."""
        n = req_pool_indices.shape[0]
        bs = padded_size(self._batch_sizes, n)
        step = self.create_inputs(n) if bs is None else self.views[bs]
        if not step.is_static or self._loaded is not req_pool_indices:
            step.set_requests(req_pool_indices)
            self._loaded = req_pool_indices if step.is_static else self._loaded
        if not step.is_static or self.launches_need_lengths:
            step.load_lengths(self.pool)
        return step

    def load_in_graph(self, step: StepInputs) -> None:
        """The first node of a captured step: what `load` has left to it."""
        if step.is_static and not self.launches_need_lengths:
            step.load_lengths(self.pool)
