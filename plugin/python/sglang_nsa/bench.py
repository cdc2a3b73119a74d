"""`python -m sglang_nsa bench`: SGLang's own path and the plugin's layouts, on SGLang's real classes.

First compares every field, derived ones included; then times, a call of each path in turn. On a GPU,
completion is synchronize, call, synchronize; enqueue is the call alone; launches is what the call starts;
graph is the GPU time of it all as nodes of a graph, of `in_graph` of what it captures.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .counters import Counters
from .draft_metadata import DraftMetadata
from .family import Installed, find_installed
from .own_path import Batch
from .real_classes import (
    SERVER_ARGS,
    Sizes,
    StaticBuffers,
    build_wrapper,
    make_batch,
    slot_allocator,
    token_table,
)
from .settings import LAYOUTS, Settings
from .verification import difference

CALLS = 200  # timed, after a tenth as many that are not
Call = Callable[[], None]


def run_bench(
    kind: str, steps: list[int], sizes: list[int], dims: Sizes, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each depth, batch size and path; raises where a field differs."""
    installed = find_installed(kind)
    cases = [Case(installed, depth, sizes, dims, device) for depth in steps]
    timed = [pair for case in cases for bs in sizes for pair in case.timed(bs)]
    if device.type == "cuda":  # last of all: a profiler that has run once slows launches down
        for path, row in timed:
            row["launches"] = _launches(path.call)
    return [row for _, row in timed]


@dataclass(frozen=True)
class Path:
    """One way to bring the metadata up to date: what the host calls, and what runs on the GPU for it."""

    name: str
    call: Call
    on_gpu: Call | None  # None where it cannot be captured
    stale: list[str]


class Case:
    """SGLang's own wrapper and one wrapper of each layout, captured over static buffers of their own."""

    def __init__(
        self, installed: Installed, steps: int, sizes: list[int], dims: Sizes, device: torch.device
    ) -> None:
        self.installed, self.steps, self.dims, self.device = installed, steps, dims, device
        self.req_to_token = token_table(dims, device)
        self.memory: dict[str, int] = {}
        self.own = self._wrapper("sglang", sizes, None)
        self.form = installed.form(self.own[0].attn_backends[0])
        self.drafts = {layout: self._wrapper(layout, sizes, layout) for layout in LAYOUTS}

    def _wrapper(self, name: str, sizes: list[int], layout: str | None) -> tuple[Any, StaticBuffers, Any]:
        wrapper = build_wrapper(self.installed, self.dims, self.req_to_token, self.steps)
        buffers = StaticBuffers(self.installed, max(sizes), self.device)
        draft = None
        if layout is not None:
            settings = Settings(layout=layout)
            allocator = slot_allocator(self.dims, self.device)
            draft = DraftMetadata(self.installed, settings, wrapper, SERVER_ARGS, Counters(), allocator)
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

    def timed(self, bs: int) -> list[tuple[Path, dict[str, Any]]]:
        paths = [self._own_path(bs), *(self._layout_path(layout, bs) for layout in self.drafts)]
        times = _host_times([path.call for path in paths], self.device)
        return [(path, self._row(path, bs, *measured)) for path, measured in zip(paths, times)]

    def _own_path(self, bs: int) -> Path:
        wrapper, buffers, _ = self.own
        given = buffers.set(self._batch(bs), bs)

        def call() -> None:
            self.installed.replay(wrapper, given, bs)

        call()
        on_gpu = call if self.form.fields.by_step else None  # of the others' paths some wait for the device
        return Path("sglang", call, on_gpu, self._stale(bs))

    def _layout_path(self, layout: str, bs: int) -> Path:
        wrapper, buffers, draft = self.drafts[layout]
        given, view = buffers.set(self._batch(bs), bs), buffers.view(bs)
        draft._captured = view

        def call() -> None:
            draft.replay(given, bs)

        graph = self._captured_graph(lambda: draft.run_in_graph(view)) if layout == "in_graph" else None
        call()
        if graph is not None:
            graph()
        self._check(wrapper, layout, bs)
        return Path(layout, call, draft._plans[bs].run, [])

    def _captured_graph(self, run: Call) -> Call:
        """What a draft graph that begins with `run` does first, at its replay."""
        run()  # whatever is compiled at first use
        if self.device.type != "cuda":
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _batch(self, bs: int) -> Batch:
        rng = random.Random(bs)
        longest = self.dims.context_len - self.steps  # drafts come on top
        lengths = [rng.randint(longest // 2, longest) for _ in range(bs)]
        return make_batch(self.installed, lengths, list(range(1, bs + 1)), self.device)

    def _stale(self, bs: int) -> list[str]:
        """Derived fields that SGLang's own path leaves behind in some backend."""
        found = []
        for index, wrong in enumerate(self._differences(self.own[0], bs)):
            if wrong is not None:
                found.append(f"{wrong.field} of backend {index}")
        return found

    def _check(self, wrapper: Any, layout: str, bs: int) -> None:
        for wrong in self._differences(wrapper, bs):
            if wrong is not None:
                raise RuntimeError(f"layout {layout}, batch size {bs}: {wrong}")

    def _differences(self, wrapper: Any, bs: int) -> list[Any]:
        found = [backend.decode_cuda_graph_metadata[bs] for backend in wrapper.attn_backends]
        return [
            difference(self.form, expected, metadata, index)
            for index, (expected, metadata) in enumerate(zip(self._reference(bs), found))
        ]

    def _reference(self, bs: int) -> list[Any]:
        """SGLang's metadata of each backend. Where all hold the same, by one backend alone, whose derived
        fields its path does refresh."""
        depth = self.steps if self.form.fields.by_step else 2
        wrapper = build_wrapper(self.installed, self.dims, self.req_to_token, depth)
        buffers = StaticBuffers(self.installed, bs, self.device)
        self.installed.init_state(wrapper, bs, bs)
        self.installed.capture(wrapper, buffers.view(bs))
        self.installed.refresh(wrapper, buffers.set(self._batch(bs), bs), bs)
        sets = [backend.decode_cuda_graph_metadata[bs] for backend in wrapper.attn_backends]
        return sets if self.form.fields.by_step else sets * (self.steps - 1)

    def _row(self, path: Path, bs: int, enqueue: float, completion: float) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "N": self.steps - 1,
            "bs": bs,
            "path": path.name,
            "enqueue_us": enqueue,
            "completion_us": completion,
            "launches": None,
            "graph_us": _graph_time(path.on_gpu) if on_gpu and path.on_gpu else None,
            "state_bytes": self.memory[path.name],
            "stale": path.stale,
        }


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _host_times(calls: list[Call], device: torch.device) -> list[tuple[float, float]]:
    """Medians in microseconds of each call alone, and with what it started; all are called in turn."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    enqueued: list[list[float]] = [[] for _ in calls]
    completed: list[list[float]] = [[] for _ in calls]
    for i in range(CALLS + CALLS // 10):
        for k, call in enumerate(calls):
            wait()
            started = time.perf_counter()
            call()
            returned = time.perf_counter()
            wait()
            if i >= CALLS // 10:
                enqueued[k].append(returned - started)
                completed[k].append(time.perf_counter() - started)
    return [(_median_us(enqueued[k]), _median_us(completed[k])) for k in range(len(calls))]


def _median_us(times: list[float]) -> float:
    return round(statistics.median(times) * 1e6, 1)


def _launches(call: Call) -> int:
    """Kernels and copies that a call starts, those of a graph that it replays included."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def _graph_time(call: Call, copies: int = 50) -> float:
    """GPU time in microseconds of what `call` enqueues, as nodes of a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
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
    print(" N   bs  path       enqueue us  ratio completion us  launches  graph us  state MiB")
    own: dict[tuple[int, int], float] = {}
    for row in rows:
        key = (row["N"], row["bs"])
        if row["path"] == "sglang":
            own[key] = row["enqueue_us"]
        ratio = own[key] / max(row["enqueue_us"], 0.1)
        launches, graph = (("" if row[name] is None else row[name]) for name in ("launches", "graph_us"))
        print(
            f"{row['N']:>2} {row['bs']:>4}  {row['path']:<10} {row['enqueue_us']:>10.1f} {ratio:>5.1f}x"
            f" {row['completion_us']:>13.1f} {launches:>9} {graph:>9}  {row['state_bytes'] / 2**20:.1f}"
            + (f"  stale: {', '.join(row['stale'])}" if row["stale"] else "")
        )
