"""A decode step, or a part of one, captured as one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch

from sglang.srt.model_executor.graph_runner import GraphRunner, StepInputs
from sglang.srt.model_executor.step_function import StepFunction

Outputs = TypeVar("Outputs")


class StepGraph(Generic[Outputs]):
    """`body(step)` calls the `functions` and does what lies between them, and never waits for the host."""

    def __init__(
        self, name: str, functions: Sequence[StepFunction], body: Callable[[StepInputs], Outputs]
    ) -> None:
        self.name = name
        self.functions = tuple(functions)
        self.body = body
        self.checked = tuple(f for f in self.functions if f.checks_replays)
        self.runner: GraphRunner[Outputs] | None = None

    def capture(
        self,
        views: Mapping[int, StepInputs],
        device: torch.device,
        memory_pool: tuple[int, int] | None = None,
    ) -> None:
        """Captures the body over the static inputs of each batch size; the functions are planned."""
        self.runner = GraphRunner(self.name, device, list(views))
        self.runner.capture(
            lambda bs: self._refresh(bs, -1), lambda bs: self.body(views[bs]), memory_pool=memory_pool
        )

    def replay(self, bs: int, max_len: int) -> Outputs:
        """Runs a captured batch size over the static inputs. `max_len` bounds the row lengths."""
        self._refresh(bs, max_len)
        outputs = self.runner.replay(bs)
        for function in self.checked:
            function.check(bs)
        return outputs

    def run(self, step: StepInputs, max_len: int) -> Outputs:
        """Over the static inputs from the graph, over others eagerly."""
        return self.replay(step.bs, max_len) if step.is_static else self.body(step)

    def _refresh(self, bs: int, max_len: int) -> None:
        for function in self.functions:
            function.refresh(bs, max_len)
