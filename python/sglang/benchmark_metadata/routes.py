"""The ways to get metadata into N backends: each is the runtime's own `GraphMetadata`, ready to be called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang.srt.layers.attention.nsa.kernels import load_kernels
from sglang.srt.layers.attention.nsa.metadata import poison_
from sglang.srt.layers.attention.nsa.metadata_generators import FusedGenerator
from sglang.srt.layers.attention.nsa.paths import PATHS, GraphMetadata, MetadataSelection

from .cases import READS, BenchCase, BenchInputs
from .competitors import ALL_COPIERS, GENERATORS, NEEDS_CUDA, methods_of
from .measure import capture_graph

POISON = -0x5A5A5A5B


@dataclass(frozen=True)
class Route:
    """A path with its methods; `copy` is '-' where nothing is copied."""

    path: str
    copy: str = "-"
    generator: str = "fused"

    def copies(self, case: BenchCase) -> bool:
        """Whether there is a staging set that is copied out of."""
        return self.path == "replicate" and case.backends > 1 and ALL_COPIERS[self.copy] is not None

    def bytes(self, case: BenchCase) -> int:
        """Read and written by the path, each source once, whatever else its implementation touches."""
        n, generated = case.backends, case.generate_bytes(by_page=self.generator == "fused")
        more_lengths = (len(set(case.offsets)) - 1) * case.length_bytes
        if self.path == "recompute":
            return generated + (n - 1) * case.live_set_bytes
        if self.path == "indirect":
            return case.indirect_bytes
        if self.copies(case):
            return generated + more_lengths + (1 + n) * case.set_bytes
        if self.path == "replicate":  # straight into every backend
            return generated + (n - 1) * case.live_set_bytes
        return generated + more_lengths

    def held_bytes(self, case: BenchCase) -> int:
        """Page tables that the path keeps allocated."""
        path = PATHS[self.path]
        if not path.has_tables:
            return 0
        sets = 1 if path.shares_buffers else case.backends + self.copies(case)
        flat = case.set_bytes if self.copy == "cat" else 0
        return sets * case.table_bytes + flat


# The first line is what ratios refer to; the second is the scheme that was published.
ROUTES: tuple[Route, ...] = (
    Route("recompute", generator="torch"),
    Route("replicate", "torch", generator="torch"),
    Route("replicate", "torch"),
    Route("replicate", "foreach"),
    Route("replicate", "streams"),
    Route("replicate", "cat"),
    Route("replicate", "triton"),
    Route("replicate", "fused_n"),
    Route("replicate", "fused"),
    Route("replicate", "direct"),
    Route("replicate", "direct", generator="columns"),
    Route("shared", generator="torch"),
    Route("shared"),
    Route("shared", generator="columns"),
    Route("in_graph"),
    Route("in_graph", generator="columns"),
    Route("indirect"),
)


def routes_of(case: BenchCase) -> list[Route]:
    """With one backend there is nothing to copy, so replicate is measured once for each generator."""
    return [r for r in ROUTES if case.backends > 1 or r.path != "replicate" or r.copy in ("torch", "fused")]


def unavailable(route: Route, device: torch.device) -> str | None:
    """Why a route cannot be measured here, or None."""
    if route.copy in NEEDS_CUDA and device.type != "cuda":
        return "needs CUDA"
    if issubclass(GENERATORS[route.generator], FusedGenerator) or route.copy == "fused":
        try:
            load_kernels(device.type)
        except ImportError as error:
            return str(error)
    return None


class Subject:
    """A planned route over the inputs of a case.

    `call` does the whole work. `host_call` is what the host does in front of the graph: the same, except on
    the in-graph path, where `call` replays a graph of nothing but the generation.
    """

    def __init__(self, route: Route, case: BenchCase, inputs: BenchInputs, device: torch.device) -> None:
        self.route, self.case, self.inputs, self.device = route, case, inputs, device
        enabled = route.path != "recompute"
        selection = MetadataSelection(
            enabled, route.path if enabled else "replicate", "auto", case.draft_seqlens
        )
        methods = methods_of(route.copy, route.generator)
        self.metadata = GraphMetadata(selection, case.shape, case.offsets, device, methods, reads=READS)
        self.metadata.capture(inputs.metadata_inputs)
        replay, bs, max_len = self.metadata.replay, case.bs, case.max_len
        self.host_call: Callable[[], None] = lambda: replay(bs, max_len)
        self.call = self.host_call
        self.in_graph = self.metadata.path.in_graph
        if self.in_graph:
            self.call = self.capture().replay if device.type == "cuda" else self.run_in_graph

    def run_in_graph(self) -> None:
        self.metadata.run_in_graph(self.case.bs)

    def capture(self, times: int = 1) -> torch.cuda.CUDAGraph:
        """A CUDA graph of `times` generations and nothing else."""
        self.run_in_graph()  # whatever is lazy happens outside of the capture

        def generations() -> None:
            for _ in range(times):
                self.run_in_graph()

        return capture_graph(generations, self.device)

    def check(self) -> None:
        """Every set of inputs, with poison in all buffers before: raises where one live element differs."""
        for index in range(len(self.inputs.sets)):
            for buffers in (*self.metadata.buffers, *self.metadata.staging):
                poison_(buffers.view(self.case.bs), POISON)
            self.inputs.load(index)
            self.host_call()
            self.call()
            self.metadata.check(self.case.bs)
        if self.metadata.fallbacks:
            raise RuntimeError(f"{self.route}: {self.metadata.fallback_reason}")
