"""Times and counts: completion, host enqueue, time on the GPU, launches."""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Call = Callable[[], object]

WARMUP = 5
PROFILED_CALLS = 2
_QUEUE_CYCLES = 200_000  # keeps the GPU busy while the host queues what is timed with events


@dataclass(frozen=True)
class Budget:
    """How long one line may be measured, in each round over all lines."""

    seconds: float
    most: int = 67
    least: int = 5


ROUNDS = 3  # so that a slow moment of the machine does not hit one line alone


@dataclass(frozen=True)
class Timing:
    """Microseconds of repeated calls."""

    completion: tuple[float, ...]
    enqueue: tuple[float, ...]

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.completion + other.completion, self.enqueue + other.enqueue)

    @staticmethod
    def percentile(values: Sequence[float], percent: float) -> float:
        ordered = sorted(values)
        return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_clock(device: torch.device) -> Callable[[], int]:
    """Nanoseconds. Where one thread does all the work, its own time: other load does not lengthen that."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time_ns if alone else time.perf_counter_ns


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure_all(
    calls: Sequence[Call], rotate: Callable[[int], None], device: torch.device, budget: Budget
) -> list[Timing]:
    """Several rounds over all calls."""
    timings = [Timing((), ())] * len(calls)
    for _ in range(ROUNDS):
        timings = [timing + measure(call, rotate, device, budget) for timing, call in zip(timings, calls)]
    return timings


def measure(call: Call, rotate: Callable[[int], None], device: torch.device, budget: Budget) -> Timing:
    """Synchronize, call, synchronize; the inputs change between calls, outside of what is timed."""
    for i in range(WARMUP):
        rotate(i)
        call()
    completion, enqueue, clock = [], [], host_clock(device)
    with no_garbage_collection():
        started = time.perf_counter()
        for i in range(budget.most):
            if i >= budget.least and time.perf_counter() - started > budget.seconds:
                break
            rotate(i)
            synchronize(device)
            t0 = clock()
            call()
            t1 = clock()
            synchronize(device)
            t2 = clock()
            enqueue.append((t1 - t0) / 1e3)
            completion.append((t2 - t0) / 1e3)
    return Timing(tuple(completion), tuple(enqueue))


@dataclass(frozen=True)
class Activity:
    """What one call did, as the profiler saw it."""

    count: float  # CUDA: kernels, copies and fills; CPU: operators dispatched, and replays of plans
    kernel_us: float | None  # sum of their durations on the GPU


def count_activity(calls: Sequence[Call], device: torch.device) -> list[Activity]:
    """Profiles all calls in one session; events belong to the call in whose window they began."""
    cuda = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=kinds) as profiler:
            for i, call in enumerate(calls):
                with record_function(f"window-{i}"):
                    for _ in range(PROFILED_CALLS):
                        call()
                    synchronize(device)
                if cuda:
                    time.sleep(0.0005)  # the clocks of host and GPU agree to some microseconds
    events = profiler.profiler.kineto_results.events()
    windows = [(0, 0)] * len(calls)
    for event in events:
        if event.name().startswith("window-") and _on_host(event):
            windows[int(event.name()[7:])] = (event.start_ns(), event.start_ns() + event.duration_ns())
    found = sorted(_gpu_events(events) if cuda else _top_level_operators(events))
    activities = [_in_window(found, window) for window in windows]
    if cuda:
        return activities
    return [Activity(a.count + _count_replays(call), None) for a, call in zip(activities, calls)]


def _in_window(found: list[tuple[int, int]], window: tuple[int, int]) -> Activity:
    durations = [duration for start, duration in found if window[0] <= start < window[1]]
    return Activity(len(durations) / PROFILED_CALLS, sum(durations) / 1e3 / PROFILED_CALLS)


def _count_replays(call: Call) -> int:
    """Calls of the kernel library's builtin, which is no operator."""
    count = 0

    def see(_frame: FrameType, event: str, function: Any) -> None:
        nonlocal count
        count += event == "c_call" and function.__name__ == "metadata_replay"

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def _on_host(event) -> bool:
    return "CPU" in str(event.device_type())


def _gpu_events(events) -> list[tuple[int, int]]:
    """(start, duration) in ns of everything that ran on the GPU; annotations are shown there, too."""
    return [
        (e.start_ns(), e.duration_ns())
        for e in events
        if not _on_host(e) and not e.name().startswith("window-")
    ]


def _top_level_operators(events) -> list[tuple[int, int]]:
    """(start, duration) in ns of operators that were called from Python, not from another operator."""
    operators = sorted((e.start_ns(), -e.duration_ns()) for e in events if _is_operator(e))
    found, end = [], 0
    for start, negative in operators:
        if start >= end:
            found.append((start, -negative))
            end = start - negative
    return found


def _is_operator(event) -> bool:
    return _on_host(event) and "::" in event.name() and not event.name().startswith("window-")


def graph_time_us(graph: torch.cuda.CUDAGraph, device: torch.device, repeats: int = 25) -> float:
    """Median time between events around one replay, all queued behind a kernel that keeps the GPU busy."""
    samples = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_QUEUE_CYCLES)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        samples.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(samples)


def capture_graph(function: Call, device: torch.device) -> torch.cuda.CUDAGraph:
    """Captured without what `torch.cuda.graph` does around it: collecting garbage, emptying the cache."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a graph is empty
        graph.capture_begin()
        function()
        graph.capture_end()
    torch.cuda.synchronize(device)
    return graph


@functools.cache
def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written in a second by the faster of two torch kernels that move about `size` bytes. For
    a GPU's memory `size` must be far above its cache; the times are the GPU's own, between events."""
    src = torch.zeros(max(size // 8, 1), dtype=torch.int32, device=device)
    dst = torch.empty_like(src)
    calls = (lambda: dst.copy_(src), lambda: torch.bitwise_not(src, out=dst))
    return 8 * src.numel() / min(_call_us(call, device) for call in calls) * 1e6


def _call_us(call: Call, device: torch.device, calls: int = 5, rounds: int = 7) -> float:
    """Median over rounds of several calls in a row."""
    if device.type != "cuda":
        return statistics.median(measure(call, lambda _: None, device, Budget(0.1)).completion)
    samples = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        samples.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(samples)
