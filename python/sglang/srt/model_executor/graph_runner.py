"""Captures a function over static buffers for a list of batch sizes, and replays it.

On CUDA a capture is a `torch.cuda.CUDAGraph`; on the CPU the function is simply run again over the same
buffers. Padding, metadata and replay are the same code on both.
"""

from __future__ import annotations

import bisect
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from tqdm import tqdm

from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

logger = logging.getLogger(__name__)

Outputs = TypeVar("Outputs")

_WARMUP_RUNS = 2  # before a capture: lazy initialisation and Triton's compilation happen here


def capture_batch_sizes(max_bs: int) -> list[int]:
    """The batch sizes to capture: all small ones, then steps that waste at most a third in padding."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256]
    sizes += range(320, max_bs + 1, 64)
    return sorted({size for size in sizes if size <= max_bs} | {max_bs})


def padded_size(batch_sizes: Sequence[int], bs: int) -> int | None:
    """The first of the sorted sizes that holds bs requests; None where there is none."""
    index = bisect.bisect_left(batch_sizes, bs)
    return batch_sizes[index] if index < len(batch_sizes) else None


@dataclass(frozen=True)
class StepInputs:
    """Inputs of one step's functions: static buffers in a captured graph, fresh tensors in an eager pass.

    A padded request has index 0, whose committed length is 1.
    """

    req_pool_indices: torch.Tensor  # [bs], int32
    seq_lens: torch.Tensor  # [bs], int32: committed lengths
    tokens: torch.Tensor  # [bs, D], int64: the last token and its S drafts, which are verified
    output: torch.Tensor  # [bs, D + 1], int64: next_tokens and accept_lens, for the host
    accept_lens: torch.Tensor  # [bs], int32: how many of next_tokens are accepted, 1 .. D
    extend_seq_lens: torch.Tensor  # [bs], int32: committed lengths after this step
    last_rows: torch.Tensor  # [bs], int64: of the bs * D rows, each request's last accepted one
    hidden_states: torch.Tensor  # [bs, D, hidden]: of the target's D rows
    is_static: bool = False  # what graphs were captured over

    @classmethod
    def create(
        cls, bs: int, num_draft_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> StepInputs:
        def ints(*size: int, dtype: torch.dtype = torch.int32, fill: int = 0) -> torch.Tensor:
            return torch.full(size, fill, dtype=dtype, device=device)

        return cls(
            req_pool_indices=ints(bs),
            seq_lens=ints(bs, fill=1),
            tokens=ints(bs, num_draft_tokens, dtype=torch.int64),
            output=ints(bs, num_draft_tokens + 1, dtype=torch.int64),
            accept_lens=ints(bs, fill=1),
            extend_seq_lens=ints(bs, fill=2),
            last_rows=ints(bs, dtype=torch.int64),
            hidden_states=torch.zeros((bs, num_draft_tokens, hidden_size), dtype=dtype, device=device),
        )

    @property
    def bs(self) -> int:
        return self.req_pool_indices.shape[0]

    @property
    def draft_tokens(self) -> torch.Tensor:
        """[bs, S], int64"""
        return self.tokens[:, 1:]

    @property
    def next_tokens(self) -> torch.Tensor:
        """[bs, D], int64: what the target says after each of its D rows."""
        return self.output[:, :-1]

    def view(self, bs: int) -> StepInputs:
        """The first bs requests of static inputs."""
        tensors = {name: value[:bs] for name, value in vars(self).items() if name != "is_static"}
        return StepInputs(**tensors, is_static=True)

    def set_requests(self, req_pool_indices: torch.Tensor) -> None:
        """Names a batch of up to bs requests; the rest is padding."""
        n = req_pool_indices.shape[0]
        self.req_pool_indices[:n].copy_(req_pool_indices)
        self.req_pool_indices[n:].zero_()

    def load_lengths(self, pool: ReqToTokenPool) -> None:
        """The committed lengths of the batch."""
        torch.index_select(pool.seq_lens, 0, self.req_pool_indices, out=self.seq_lens)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A graph or a tensor that the collector frees while a stream is capturing breaks the capture."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class GraphRunner(Generic[Outputs]):
    """One function of a batch size, captured for each of `batch_sizes`."""

    def __init__(self, name: str, device: torch.device, batch_sizes: Sequence[int]) -> None:
        self.name = name
        self.device = device
        self.batch_sizes = sorted(batch_sizes)
        self.function: Callable[[int], Outputs] | None = None
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Outputs]] = {}

    def padded(self, bs: int) -> int | None:
        """The captured size that holds bs requests; None where there is none."""
        return padded_size(self.batch_sizes, bs)

    def capture(
        self,
        prepare: Callable[[int], None],
        function: Callable[[int], Outputs],
        memory_pool: tuple[int, int] | None = None,
    ) -> None:
        """Captures `function(bs)` for every batch size; `prepare(bs)` runs before each, outside the graph.
        `memory_pool` is that of other graphs which never run at the same time."""
        self.function = function
        sizes = sorted(self.batch_sizes, reverse=True)  # the largest first: its memory serves the others
        if self.device.type != "cuda":
            for bs in sizes:
                prepare(bs)
            return
        free_before = torch.cuda.mem_get_info(self.device)[0]
        pool = memory_pool or torch.cuda.graph_pool_handle()
        with _no_garbage_collection():
            for bs in tqdm(sizes, desc=f"capture {self.name}", unit="graph"):
                prepare(bs)
                self.graphs[bs] = self._capture_one(bs, pool)
        used = free_before - torch.cuda.mem_get_info(self.device)[0]
        logger.info("captured %s for batch sizes %s: %.1f MiB", self.name, self.batch_sizes, used / 2**20)

    def replay(self, bs: int) -> Outputs:
        """Runs the function for a captured batch size. The outputs are valid until the next replay."""
        if self.device.type != "cuda":
            return self.function(bs)
        graph, outputs = self.graphs[bs]
        graph.replay()
        return outputs

    def _capture_one(self, bs: int, pool: tuple[int, int]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_RUNS):
                self.function(bs)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = self.function(bs)
        return graph, outputs
