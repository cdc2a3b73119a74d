"""What a step has made, on its way to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

_IN_FLIGHT = 2  # steps that may be launched and not yet read


class ReadBack:
    """Copies a few integers of each step to the host, without waiting for them."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            shape = (rows, columns)
            self._host = [torch.empty(shape, dtype=torch.int64, pin_memory=True) for _ in range(_IN_FLIGHT)]
            self._ready = [torch.cuda.Event() for _ in range(_IN_FLIGHT)]
            self._next = 0

    def start(self, values: torch.Tensor) -> Callable[[], list[list[int]]]:
        """Starts to copy values [n <= rows, columns], int64. What it returns waits for them: call it before
        the second start after this one."""
        if not self._on_cuda:
            lists = values.tolist()
            return lambda: lists
        at, self._next = self._next, (self._next + 1) % _IN_FLIGHT
        host, ready = self._host[at][: values.shape[0]], self._ready[at]
        host.copy_(values, non_blocking=True)
        ready.record()

        def wait() -> list[list[int]]:
            ready.synchronize()
            return host.tolist()

        return wait
