"""`python -m sglang_nsa bench`: SGLang's own path and the plugin's layouts, on SGLang's real classes.

First compares every field, derived ones included; then times. On a GPU, completion is synchronize, call,
synchronize; enqueue is the call alone; graph is the GPU time of the node that `in_graph` captures.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .counters import Counters
from .draft_metadata import DraftMetadata
from .family import Installed, find_installed
from .own_path import Batch
from .real_classes import Sizes, StaticBuffers, build_wrapper, make_batch, token_table
from .settings import LAYOUTS, Settings
from .verification import difference

CALLS = 200  # timed, after a tenth as many that are not


def run_bench(
    steps: list[int], sizes: list[int], context_len: int, decode: str, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each depth, batch size and path; raises where a field differs."""
    installed = find_installed()
    dims = Sizes(context_len, max(sizes) + 1, decode=decode)
    cases = (Case(installed, depth, sizes, dims, device) for depth in steps)
    return [row for case in cases for bs in sizes for row in case.rows(bs)]


class Case:
    """SGLang's own wrapper and one wrapper of each layout, captured over static buffers of their own."""

    def __init__(
        self, installed: Installed, steps: int, sizes: list[int], dims: Sizes, device: torch.device
    ) -> None:
        self.installed, self.steps, self.dims, self.device = installed, steps, dims, device
        self.req_to_token = token_table(dims, device)
        self.memory: dict[str, int] = {}
        self.own = self._wrapper("sglang", sizes, None)
        self.drafts = {layout: self._wrapper(layout, sizes, layout) for layout in LAYOUTS}

    def _wrapper(self, name: str, sizes: list[int], layout: str | None) -> tuple[Any, StaticBuffers, Any]:
        wrapper = build_wrapper(self.installed, self.dims, self.req_to_token, self.steps)
        buffers = StaticBuffers(self.installed, max(sizes), self.device)
        draft = None
        if layout is not None:
            draft = DraftMetadata(self.installed, Settings(layout=layout), wrapper, None, Counters())
        before = _allocated(self.device)
        if draft is None:
            self.installed.init_state(wrapper, max(sizes), max(sizes))
        else:
            draft.init_state(max(sizes), max(sizes))
        self.memory[name] = _allocated(self.device) - before
        for bs in sizes:
            self.installed.capture(wrapper, buffers.view(bs)) if draft is None else draft.capture(
                buffers.view(bs)
            )
        if draft is not None and (draft.layout, draft.reason) != (layout, None):
            raise RuntimeError(f"layout {layout}: {draft.layout}, {draft.reason}")
        return wrapper, buffers, draft

    def rows(self, bs: int) -> list[dict[str, Any]]:
        batch = self._batch(bs)
        own, buffers, _ = self.own
        given = buffers.set(batch, bs)
        self.installed.replay(own, given, bs)
        stale = self._stale(bs)
        rows = [self._row("sglang", bs, lambda: self.installed.replay(own, given, bs)) | {"stale": stale}]
        for layout, (wrapper, buffers, draft) in self.drafts.items():
            given = buffers.set(batch, bs)
            view = buffers.view(bs)
            draft._captured = view
            draft.replay(given, bs)
            draft.run_in_graph(view)
            self._check(wrapper, layout, bs)
            row = self._row(layout, bs, lambda draft=draft, given=given: draft.replay(given, bs))
            if layout == "in_graph" and self.device.type == "cuda":
                row["graph_us"] = _graph_time(lambda draft=draft, view=view: draft.run_in_graph(view))
            rows.append(row | {"stale": []})
        return rows

    def _batch(self, bs: int) -> Batch:
        rng = random.Random(bs)
        lengths = [rng.randint(self.dims.context_len // 2, self.dims.context_len) for _ in range(bs)]
        return make_batch(self.installed, lengths, list(range(1, bs + 1)), self.device)

    def _stale(self, bs: int) -> list[str]:
        """Derived fields that SGLang's own path leaves behind in some backend."""
        reference = self._reference(bs)
        found = []
        for index, backend in enumerate(self.own[0].attn_backends):
            wrong = difference(
                reference, backend.decode_cuda_graph_metadata[bs], self._prefix, self.dims.topk, index
            )
            if wrong is not None:
                found.append(f"{wrong.field} of backend {index}")
        return found

    def _check(self, wrapper: Any, layout: str, bs: int) -> None:
        reference = self._reference(bs)
        for index, backend in enumerate(wrapper.attn_backends):
            found = backend.decode_cuda_graph_metadata[bs]
            wrong = difference(reference, found, self._prefix, self.dims.topk, index)
            if wrong is not None:
                raise RuntimeError(f"layout {layout}, batch size {bs}: {wrong}")

    @property
    def _prefix(self) -> str:
        return self.installed.family.prefix

    def _reference(self, bs: int) -> Any:
        """SGLang's metadata by one backend alone, whose derived fields its path does refresh."""
        wrapper = build_wrapper(self.installed, self.dims, self.req_to_token, 2)
        buffers = StaticBuffers(self.installed, bs, self.device)
        self.installed.init_state(wrapper, bs, bs)
        self.installed.capture(wrapper, buffers.view(bs))
        self.installed.refresh(wrapper, buffers.set(self._batch(bs), bs), bs)
        return wrapper.attn_backends[0].decode_cuda_graph_metadata[bs]

    def _row(self, path: str, bs: int, call: Callable[[], None]) -> dict[str, Any]:
        enqueue, completion = _host_times(call, self.device)
        return {
            "N": self.steps - 1,
            "bs": bs,
            "path": path,
            "enqueue_us": enqueue,
            "completion_us": completion,
            "graph_us": None,
            "state_bytes": self.memory[path],
        }


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _host_times(call: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Medians in microseconds: of the call, and of the call and what it started."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    enqueued, completed = [], []
    for i in range(CALLS + CALLS // 10):
        wait()
        started = time.perf_counter()
        call()
        returned = time.perf_counter()
        wait()
        if i >= CALLS // 10:
            enqueued.append(returned - started)
            completed.append(time.perf_counter() - started)
    return tuple(round(statistics.median(times) * 1e6, 1) for times in (enqueued, completed))


def _graph_time(call: Callable[[], None], copies: int = 50) -> float:
    """GPU time in microseconds of what `call` enqueues, as nodes of a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(copies):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(20):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / copies)
    return round(statistics.median(times), 2)


def print_table(rows: list[dict[str, Any]]) -> None:
    print(" N   bs  path       enqueue us completion us  graph us  ratio  state MiB")
    own: dict[tuple[int, int], float] = {}
    for row in rows:
        key = (row["N"], row["bs"])
        if row["path"] == "sglang":
            own[key] = row["enqueue_us"]
        graph = "" if row["graph_us"] is None else f"{row['graph_us']:.2f}"
        ratio = own[key] / row["enqueue_us"]
        times = f"{row['enqueue_us']:>10.1f} {row['completion_us']:>13.1f}"
        print(
            f"{row['N']:>2} {row['bs']:>4}  {row['path']:<10} {times} {graph:>9} {ratio:>5.1f}x"
            f"  {row['state_bytes'] / 2**20:.1f}"
            + (f"  stale: {', '.join(row['stale'])}" if row["stale"] else "")
        )


def print_json(rows: list[dict[str, Any]]) -> None:
    print(json.dumps(rows))
