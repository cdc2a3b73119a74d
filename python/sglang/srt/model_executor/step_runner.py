"""The functions of a decode step, captured over one set of static inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.graph_runner import StepInputs, capture_batch_sizes
from sglang.srt.model_executor.step_function import StepFunction


class StepRunner:
    """Captures the functions, and loads each step's batch into the inputs that they read."""

    def __init__(
        self,
        functions: Sequence[StepFunction],
        create_inputs: Callable[[int], StepInputs],  # of a batch size
        pool: ReqToTokenPool,
    ) -> None:
        self.functions = tuple(functions)
        self.create_inputs = create_inputs
        self.pool = pool
        self.static: StepInputs | None = None  # what was captured over

    @torch.inference_mode()
    def capture(self, max_bs: int) -> None:
        self.static = self.create_inputs(max_bs)
        for function in self.functions:
            function.capture(self.static, self.pool, capture_batch_sizes(max_bs))

    def load(self, req_pool_indices: torch.Tensor) -> StepInputs:
        """The inputs of a step of these requests ([n], int32): the static ones of the captured size that
        holds them, with padding, or fresh ones where there is none."""
        n = req_pool_indices.shape[0]
        bs = None if self.static is None else self.functions[0].runner.padded(n)
        step = self.create_inputs(n) if bs is None else self.static.view(bs)
        step.set_batch(req_pool_indices, self.pool)
        return step
