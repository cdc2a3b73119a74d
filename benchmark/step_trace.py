"""What a torch profiler trace says of decode steps: kernels, gaps between them, calls of the host.

A step is found by its graphs: launches of CUDA graphs repeat with a period (one graph a step, or draft,
verify and draft-extend), and what lies between the first kernels of two periods is a step. Works for the
traces of any server.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

Event = dict[str, Any]  # of a Chrome trace: name, cat, ts and dur in us, args

GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CATEGORIES = ("cuda_runtime", "cuda_driver", "cpu_op", "user_annotation")
# A gap at least this long is one between launches; a shorter one is a kernel waiting for the one before it.
LAUNCH_GAP_US = 3.0
MAX_PERIOD = 8  # graphs of one step


@dataclass(frozen=True)
class Share:
    """One kernel or one call of the host: how often and how long in a step."""

    name: str
    count: float
    us: float  # of kernels: by how much each prolongs the time in which one runs
    idle_us: float = 0.0  # of kernels: how long nothing ran before each


@dataclass(frozen=True)
class StepProfile:
    """Means over the steps of a trace; times in us."""

    steps: int
    graphs_per_step: int
    step_us: float  # median
    busy_us: float  # at least one kernel or copy runs
    launch_gap_us: float  # idle, in gaps of LAUNCH_GAP_US or more
    kernel_gap_us: float  # idle, in shorter ones
    kernels_per_step: float
    eager_per_step: float  # of these, launched one by one
    kernels: list[Share]  # by time
    host: list[Share]  # by time; calls include what they call

    @property
    def idle_share(self) -> float:
        total = self.busy_us + self.launch_gap_us + self.kernel_gap_us
        return (self.launch_gap_us + self.kernel_gap_us) / total if total else 0.0


def read_events(path: Path) -> list[Event]:
    """The complete events of a Chrome trace, gzipped or not, in the order of their starts."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = [event for event in json.loads(raw)["traceEvents"] if event.get("ph") == "X"]
    return sorted(events, key=lambda event: event["ts"])


def analyse(events: list[Event]) -> StepProfile:
    """Raises ValueError where the trace holds no two steps."""
    device = [event for event in events if event.get("cat") in GPU_CATEGORIES]
    by_launch: dict[int, list[Event]] = defaultdict(list)
    for event in device:
        by_launch[event["args"].get("correlation", -1)].append(event)
    graphs = [
        by_launch[correlation]
        for event in events
        if "GraphLaunch" in event["name"] and (correlation := event["args"].get("correlation")) in by_launch
    ]
    period = find_period([len(graph) for graph in graphs])
    starts = sorted(min(event["ts"] for event in graph) for graph in graphs[::period])
    if len(starts) < 2:
        raise ValueError(f"the trace holds {len(graphs)} graph launches, which are no two steps")
    steps, first, last = len(starts) - 1, starts[0], starts[-1]
    inside = [event for event in device if first <= event["ts"] < last]
    in_graphs = sum(first <= event["ts"] < last for graph in graphs for event in graph)
    runs, gaps = occupancy(inside, last)
    host_from, host_to = host_window(events, graphs, first, last)
    host = [e for e in events if e.get("cat") in HOST_CATEGORIES and host_from <= e["ts"] < host_to]
    return StepProfile(
        steps=steps,
        graphs_per_step=period,
        step_us=statistics.median(b - a for a, b in pairwise(starts)),
        busy_us=sum(runs) / steps,
        launch_gap_us=sum(gap for gap in gaps if gap >= LAUNCH_GAP_US) / steps,
        kernel_gap_us=sum(gap for gap in gaps if gap < LAUNCH_GAP_US) / steps,
        kernels_per_step=len(inside) / steps,
        eager_per_step=(len(inside) - in_graphs) / steps,
        kernels=shares(inside, steps, runs, gaps),
        host=shares(host, steps, [e["dur"] for e in host], [0.0] * len(host)),
    )


def find_period(sizes: list[int]) -> int:
    """The smallest number of launches after which their sizes repeat, nearly always."""
    for period in range(1, min(MAX_PERIOD, len(sizes) // 2) + 1):
        same = [a == b for a, b in zip(sizes, sizes[period:])]
        if sum(same) >= 0.8 * len(same):
            return period
    return 1


def occupancy(events: list[Event], end: float) -> tuple[list[float], list[float]]:
    """By how much each event prolongs the time in which something runs (kernels may overlap), and how long
    nothing does before each and until `end`."""
    runs, gaps, reached = [], [], events[0]["ts"]
    for event in events:
        start, stop = event["ts"], min(event["ts"] + event["dur"], end)
        gaps.append(max(0.0, start - reached))
        runs.append(max(0.0, stop - max(start, reached)))
        reached = max(reached, stop)
    return runs, [*gaps, max(0.0, end - reached)]


def host_window(
    events: list[Event], graphs: list[list[Event]], first: float, last: float
) -> tuple[float, float]:
    """The host's time of the launches whose kernels lie between `first` and `last`."""
    wanted = {g[0]["args"]["correlation"] for g in graphs if first <= min(e["ts"] for e in g) <= last}
    launches = [
        e["ts"] for e in events if "GraphLaunch" in e["name"] and e["args"].get("correlation") in wanted
    ]
    return min(launches), max(launches)


def shares(events: list[Event], steps: int, runs: list[float], gaps: list[float]) -> list[Share]:
    """By name, of the events' `runs` and of the `gaps` before them."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event, run, gap in zip(events, runs, gaps):
        found[short_name(event["name"])].append((run, gap))
    rows = []
    for name, times in found.items():
        busy, idle = map(sum, zip(*times))
        rows.append(Share(name, len(times) / steps, busy / steps, idle / steps))
    return sorted(rows, key=lambda share: -share.us)


def short_name(name: str) -> str:
    """A kernel's name without its arguments; of its template arguments the names that tell it apart."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::|<unnamed>::", "", name)
    head, _, rest = name.partition("<")
    functors = re.findall(r"\w*(?:Functor|Op|Ops|_kernel_cuda|Kernel)\w*", rest)
    detail = next((f for f in functors if f not in head and len(f) > 4), "")
    return (head.partition("(")[0] + (f"<{detail}>" if detail else ""))[:80]


def markdown(title: str, profile: StepProfile, rows: int = 30) -> str:
    """A section with the figures of a step, its kernels and the host's calls."""
    p = profile
    lines = [
        f"### {title}",
        "",
        "| step us | GPU busy | idle between launches | idle between kernels | idle share "
        "| kernels | eager | graphs |",
        "|---|---|---|---|---|---|---|---|",
        f"| {p.step_us:.0f} | {p.busy_us:.0f} | {p.launch_gap_us:.0f} | {p.kernel_gap_us:.0f} "
        f"| {p.idle_share:.1%} | {p.kernels_per_step:.1f} | {p.eager_per_step:.1f} | {p.graphs_per_step} |",
    ]
    for kind, table in (("kernel", p.kernels), ("call of the host", p.host)):
        if not table:
            continue
        shown = table[:rows]
        if rest := table[rows:]:
            sums = (sum(getattr(s, what) for s in rest) for what in ("count", "us", "idle_us"))
            shown.append(Share(f"{len(rest)} others", *sums))
        on_device = table is p.kernels
        lines += ["", f"| {kind} | a step | us a step |" + (" idle before it |" if on_device else "")]
        lines.append("|---|---|---|" + ("---|" if on_device else ""))
        for s in shown:
            lines.append(f"| `{s.name}` | {s.count:.1f} | {s.us:.1f} |" + f" {s.idle_us:.1f} |" * on_device)
    return "\n".join(lines) + "\n"
