"""What the questions measure with: one row for each call, as the metadata benchmark measures its lines."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from sglang.benchmark_metadata.cases import BenchCase
from sglang.benchmark_metadata.measure import (
    Budget,
    Call,
    Timing,
    capture_graph,
    copy_bandwidth,
    count_activity,
    graph_time_us,
    host_clock,
    measure_all,
    no_garbage_collection,
    synchronize,
)
from sglang.benchmark_metadata.run import Settings, run_grid

Row = dict[str, Any]  # one measurement: labels, then times in microseconds

_NODES = 50  # of one call in the graph that tells what a node costs
_LOOP_NS = 50_000_000


@dataclass(frozen=True)
class Point:
    """One point of a sweep: calls by name, and what stands in their rows beside the times."""

    calls: Mapping[str, Call]
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """Measures on one device. `quick` is for tests: the smallest sizes and few repetitions."""

    device: torch.device
    quick: bool = False
    _metadata: dict[BenchCase, list[Row]] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def budget(self) -> Budget:
        return Budget(0.001, 5, 2) if self.quick else Budget(0.03)

    def rows(
        self,
        calls: Mapping[str, Call],
        *,
        graphs: bool = True,
        eager_only: Collection[str] = (),
        **labels: Any,
    ) -> list[Row]:
        """One row for each call: completion and enqueue, launches, time on the GPU; with `graphs` on CUDA
        also as a graph of its own, but for those that cannot be captured."""
        return self.sweep([Point(calls, labels)], graphs=graphs, eager_only=eager_only)

    def sweep(
        self, points: Sequence[Point], *, graphs: bool = True, eager_only: Collection[str] = ()
    ) -> list[Row]:
        """The rows of several points, measured by turns: a slow moment of the machine meets all of them."""
        named = [(name, call, point.labels) for point in points for name, call in point.calls.items()]
        calls = [call for _, call, _ in named]
        timings = measure_all(calls, _nothing, self.device, self.budget)
        rows = []
        for (name, call, labels), timing, activity in zip(named, timings, count_activity(calls, self.device)):
            row = {"method": name, **labels, **_times(timing), "launches": activity.count}
            row["gpu_us"] = activity.kernel_us
            rows.append(row)
            if graphs and self.cuda and name not in eager_only:
                row |= self._as_graph(call)
        return rows

    def _as_graph(self, call: Call) -> Row:
        """A graph of the call alone: completion of a replay, and time on the GPU less an empty graph's."""
        graph = capture_graph(call, self.device)
        (replay,) = measure_all([graph.replay], _nothing, self.device, self.budget)
        on_gpu = graph_time_us(graph, self.device) - self._empty_graph_us
        times = _times(replay)
        return {
            "graph_completion_us": times["completion_us"],
            "graph_enqueue_us": times["enqueue_us"],
            "graph_gpu_us": round(max(on_gpu, 0.0), 2),
        }

    @cached_property
    def _empty_graph_us(self) -> float:
        return graph_time_us(capture_graph(_nothing, self.device), self.device)

    def node_us(self, call: Call) -> float:
        """CUDA: time of one node where a graph runs the call many times in a row. CPU: completion."""
        if not self.cuda:
            return self.rows({"": call})[0]["completion_us"]
        call()
        graph = capture_graph(lambda: [call() for _ in range(_NODES)], self.device)
        return round(graph_time_us(graph, self.device) / _NODES, 3)

    def loops_us(self, calls: Sequence[Call]) -> list[float]:
        """Of calls in a row with one synchronization at the end: the larger of host and GPU time of one."""
        rounds = [[self._loop_us(call) for call in calls] for _ in range(3)]
        return [round(statistics.median(found), 2) for found in zip(*rounds)]

    def _loop_us(self, call: Call) -> float:
        most, clock = (3 if self.quick else 1000), host_clock(self.device)
        for _ in range(3):
            call()
        synchronize(self.device)
        with no_garbage_collection():
            started, count = clock(), 0
            while count < most and (count < 3 or clock() - started < _LOOP_NS):
                call()
                count += 1
            synchronize(self.device)
            return (clock() - started) / count / 1e3

    def bandwidth_us(self, size: int) -> float:
        """What `size` bytes, read and written, take at the bandwidth of a copy far above the cache."""
        largest = (1 << 22) if self.quick else (4 << 30) if self.cuda else (1 << 28)
        return round(size / copy_bandwidth(self.device, largest) * 1e6, 2)

    def metadata(self, cases: list[BenchCase]) -> list[Row]:
        """The metadata benchmark's own rows; a case that another question asked for is not run again."""
        missing = [case for case in cases if case not in self._metadata]
        held = torch.cuda.mem_get_info(self.device)[0] // 2 if self.cuda else 4 << 30
        for case in missing:
            rows = run_grid([case], Settings(self.device, self.budget, held))
            self._metadata[case] = [row.json() for row in rows]
        return [row for case in cases for row in self._metadata[case]]


def _nothing(*_: int) -> None:
    pass


def _times(timing: Timing) -> Row:
    return {
        "completion_us": round(statistics.median(timing.completion), 2),
        "completion_p10_us": round(timing.percentile(timing.completion, 10), 2),
        "completion_p90_us": round(timing.percentile(timing.completion, 90), 2),
        "enqueue_us": round(statistics.median(timing.enqueue), 2),
    }
