"""Runs a grid: correctness first, then the measurements of every route and the floors of the machine."""

from __future__ import annotations

import functools
import gc
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from tqdm import tqdm

from sglang.srt.layers.attention.nsa.paths import PATHS

from .cases import BenchCase, BenchInputs
from .measure import (
    Activity,
    Budget,
    Call,
    Timing,
    capture_graph,
    copy_bandwidth,
    count_activity,
    graph_time_us,
    measure,
    measure_all,
)
from .report import Row, line
from .routes import Route, Subject, routes_of, unavailable

_LARGE = 4 << 30  # bytes moved by the copy that tells a GPU's bandwidth: its launch is lost in that
_NODES = 16  # generations in the graph that tells what one more costs


@dataclass(frozen=True)
class Settings:
    device: torch.device
    budget: Budget
    max_bytes: int  # of the page tables of all routes of a case, which are alive together


def run_grid(cases: Sequence[BenchCase], settings: Settings) -> list[Row]:
    """All rows, each printed as soon as it is there."""
    rows: list[Row] = []
    total = sum(len(routes_of(case)) for case in cases)
    with tqdm(total=total, desc="metadata", unit="row", smoothing=0.1) as bar:
        gc.collect()
        gc.freeze()  # what is there now stays: collecting what a case leaves behind is quick
        for case in cases:
            for row in _run_case(case, settings, bar):
                rows.append(row)
                tqdm.write(line(row))
            gc.collect()  # the plans of a case hold its page tables
        gc.unfreeze()
    return rows


def _run_case(case: BenchCase, settings: Settings, bar: tqdm) -> Iterator[Row]:
    device = settings.device
    inputs = BenchInputs(case, device)
    subjects, skipped = _prepare(case, inputs, settings)
    rows = {subject.route: _new_row(case, subject.route, device) for subject in subjects}
    small = _small_calls(case.bs, device)
    activities = _count(case, rows, device)
    small_activities = dict(zip(small, activities[2 * len(subjects) :]))
    calls = [*(subject.call for subject in subjects), *small.values()]
    timings = measure_all(calls, inputs.load, device, settings.budget)  # what is compared takes turns
    for subject, timing in zip(subjects, timings):
        rows[subject.route].set_timing(timing)
        if subject.in_graph:
            _measure_graph(subject, rows[subject.route], settings)
    baseline = next((r.completion_us for r in rows.values() if r.path == "recompute"), None)
    small_rows = _small_rows(case, device, baseline, small_activities, timings[len(subjects) :])
    for row in (*rows.values(), *small_rows.values()):
        row.set_copies(small_rows["copy_"])
    for route in routes_of(case):
        bar.update()
        if route in skipped:
            yield _new_row(case, route, device, skipped[route])
            continue
        row = rows[route]
        row.ratio = round(baseline / row.completion_us, 3) if baseline else None
        row.set_floor(_floor_us(row.bytes, small_activities, device))
        yield row
    yield from small_rows.values()
    yield from _bandwidth_rows(case, settings)


def _prepare(
    case: BenchCase, inputs: BenchInputs, settings: Settings
) -> tuple[list[Subject], dict[Route, str]]:
    """Builds and checks every route that can be measured; the reasons for the others."""
    subjects, skipped, left = [], {}, settings.max_bytes
    for route in routes_of(case):
        held = route.held_bytes(case)
        reason = unavailable(route, settings.device)
        if reason is None and held > left:
            reason = f"its page tables take {held / 2**30:.2f} GiB, {left / 2**30:.2f} are left"
        if reason is not None:
            skipped[route] = reason
            continue
        left -= held
        subjects.append(Subject(route, case, inputs, settings.device))
        subjects[-1].check()
    return subjects, skipped


def _new_row(case: BenchCase, route: Route, device: torch.device, skipped: str | None = None) -> Row:
    return Row(
        device=device.type,
        mode=case.mode.name,
        bs=case.bs,
        context=case.context,
        N=case.backends,
        page_size=case.page_size,
        path=route.path,
        copy=route.copy,
        generator=route.generator,
        draft_seqlens=case.draft_seqlens,
        bytes=route.bytes(case),
        table_bytes=route.held_bytes(case),
        skipped=skipped,
    )


def _count(case: BenchCase, rows: dict[Route, Row], device: torch.device) -> list[Activity]:
    """Launches and time on the GPU, into the rows; returns what `_profile` found."""
    activities = _profiled(case, list(rows), device)
    for row, on_host, whole in zip(rows.values(), activities[::2], activities[1::2]):
        row.launches = on_host.count
        row.kernel_us = row.gpu_us = whole.kernel_us
        if PATHS[row.path].in_graph:
            row.graph_nodes = whole.count if device.type == "cuda" else None
            # Without graphs the host itself runs the function: what it dispatches counts.
            row.launches = on_host.count if device.type == "cuda" else whole.count
    return activities


def _profiled(case: BenchCase, routes: Sequence[Route], device: torch.device) -> list[Activity]:
    """On CUDA in a process of its own: torch's profiler stays attached where it was used once, and what is
    enqueued there afterwards takes the host half as long again."""
    if device.type != "cuda":
        return _profile(case, routes, device)
    return _profiling_process().submit(_profile, case, routes, device).result()


@functools.cache
def _profiling_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _profile(case: BenchCase, routes: Sequence[Route], device: torch.device) -> list[Activity]:
    """Of each route what the host does before a graph, then all of it; then of the small calls."""
    inputs = BenchInputs(case, device)
    inputs.load(0)
    subjects = [Subject(route, case, inputs, device) for route in routes]
    calls = [call for subject in subjects for call in (subject.host_call, subject.call)]
    calls += _small_calls(case.bs, device).values()
    for call in calls:  # what is lazy
        call()
    return count_activity(calls, device)


def _measure_graph(subject: Subject, row: Row, settings: Settings) -> None:
    """What the path costs the host, and the GPU inside of a graph."""
    device = settings.device
    if device.type != "cuda":
        return
    host = measure(subject.host_call, subject.inputs.load, device, settings.budget)
    row.enqueue_us = round(sorted(host.enqueue)[len(host.enqueue) // 2], 2)
    one, many = subject.capture(), subject.capture(_NODES)
    raw = graph_time_us(one, device)
    row.gpu_raw_us = round(raw, 2)
    row.gpu_us = round(max(raw - graph_time_us(capture_graph(lambda: None, device), device), 0.0), 2)
    row.gpu_node_us = round((graph_time_us(many, device) - raw) / (_NODES - 1), 2)


def _small_rows(
    case: BenchCase,
    device: torch.device,
    baseline: float | None,
    activities: dict[str, Activity],
    timings: Sequence[Timing],
) -> dict[str, Row]:
    """What no call beats: a launch that does nothing, one small copy."""
    rows = {}
    for (name, activity), timing in zip(activities.items(), timings):
        row = rows[name] = _floor(case, name, device)
        row.set_timing(timing)
        row.launches, row.kernel_us, row.gpu_us = activity.count, activity.kernel_us, activity.kernel_us
        row.bytes = 8 * case.bs if name == "copy_" else 0
        row.ratio = round(baseline / row.completion_us, 3) if baseline else None
    return rows


def _bandwidth_rows(case: BenchCase, settings: Settings) -> Iterator[Row]:
    """What no path can beat: its bytes at full bandwidth."""
    device = settings.device
    for name, route in (
        ("replic/bw", Route("replicate", "fused")),
        ("direct/bw", Route("replicate", "direct")),
        ("direct/co", Route("replicate", "direct", generator="columns")),
        ("shared/bw", Route("shared")),
        ("shared/co", Route("shared", generator="columns")),
    ):
        row = _floor(case, name, device)
        row.bytes = route.bytes(case)
        # On the GPU the bandwidth of its memory; a CPU's depends on which cache the case fits into.
        size = _LARGE if device.type == "cuda" else row.bytes
        row.completion_us = round(row.bytes / copy_bandwidth(device, size) * 1e6, 2)
        row.gpu_us = row.completion_us if device.type == "cuda" else None
        yield row


def _floor_us(size: int, small: dict[str, Activity], device: torch.device) -> float:
    """What no implementation of a path beats: `size` bytes at full bandwidth. On a GPU no less than a kernel
    that does nothing, and the bandwidth of its memory holds for what its cache does not."""
    if device.type != "cuda":
        return size / copy_bandwidth(device, size) * 1e6
    cached = size <= torch.cuda.get_device_properties(device).L2_cache_size
    at_bandwidth = 0.0 if cached else size / copy_bandwidth(device, _LARGE) * 1e6
    return max(small["empty"].kernel_us, at_bandwidth)


@functools.cache
def _small_calls(bs: int, device: torch.device) -> dict[str, Call]:
    """One `copy_` of bs int32; on CUDA also an empty kernel and the replay of an empty graph."""
    source = torch.zeros(bs, dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    calls: dict[str, Call] = {"copy_": lambda: target.copy_(source)}
    if device.type == "cuda":
        calls["empty"] = lambda: torch.cuda._sleep(0)
        calls["graph"] = capture_graph(lambda: None, device).replay
    return calls


def _floor(case: BenchCase, name: str, device: torch.device) -> Row:
    row = _new_row(case, Route("shared", name, "-"), device)
    row.path, row.table_bytes = "floor", None
    return row
