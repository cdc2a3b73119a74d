"""One measurement: its JSON object, and its line on the screen."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .measure import Timing


@dataclass
class Row:
    """What was found for one route in one case; None where it does not apply, times in microseconds."""

    device: str
    mode: str
    bs: int
    context: int
    N: int
    page_size: int
    path: str  # recompute | replicate | shared | in_graph | indirect | floor
    copy: str
    generator: str
    draft_seqlens: str
    completion_us: float | None = None  # median; synchronize, call, synchronize
    completion_p10_us: float | None = None
    completion_p90_us: float | None = None
    enqueue_us: float | None = None  # median of the host's part
    completion_copies: float | None = None  # completion / that of one `copy_` of bs int32, measured by turns
    enqueue_copies: float | None = None
    gpu_us: float | None = None  # kernels' time; in_graph: of a replay less that of an empty graph
    gpu_raw_us: float | None = None  # in_graph: of a replay, nothing subtracted
    gpu_node_us: float | None = None  # in_graph: what one more such node adds to a graph
    kernel_us: float | None = None  # sum over kernels and copies, by the profiler
    launches: float | None = None  # by the host; CUDA: kernels and copies, CPU: operators
    graph_nodes: float | None = None  # in_graph on CUDA: kernels and copies inside of the graph
    bytes: int | None = None  # read and written by the path
    table_bytes: int | None = None  # page tables kept allocated
    ratio: float | None = None  # completion of the per-backend computation / this completion
    floor_us: float | None = None  # below which no implementation comes: see run.py
    floor_ratio: float | None = None  # CUDA: gpu_us / floor_us; CPU: completion_us / floor_us
    iterations: int = 0
    skipped: str | None = None

    def set_timing(self, timing: Timing) -> None:
        self.completion_us = round(statistics.median(timing.completion), 2)
        self.completion_p10_us = round(timing.percentile(timing.completion, 10), 2)
        self.completion_p90_us = round(timing.percentile(timing.completion, 90), 2)
        self.enqueue_us = round(statistics.median(timing.enqueue), 2)
        self.iterations = len(timing.completion)

    def set_copies(self, one_copy: Row) -> None:
        if self.completion_us is not None and self.enqueue_us is not None:
            self.completion_copies = round(self.completion_us / one_copy.completion_us, 2)
            self.enqueue_copies = round(self.enqueue_us / one_copy.enqueue_us, 2)

    def set_floor(self, floor_us: float) -> None:
        figure = self.gpu_us if self.device == "cuda" else self.completion_us
        if figure is not None and floor_us > 0:
            self.floor_us, self.floor_ratio = round(floor_us, 2), round(figure / floor_us, 3)

    def json(self) -> dict[str, Any]:
        return asdict(self)


_COLUMNS = (
    f"{'mode':<13} {'bs':>3} {'context':>7} {'N':>2} {'page':>4}  {'path':<9} {'copy':<9} {'generate':<8} "
    f"{'completion us':>13} {'p10':>8} {'p90':>8} {'x copy_':>7} {'enqueue us':>10} {'x copy_':>7} "
    f"{'gpu us':>8} {'launches':>8} {'MB moved':>9} {'tables MiB':>10} {'ratio':>7} "
    f"{'floor us':>8} {'x floor':>7}"
)


def header() -> str:
    return _COLUMNS + "\n" + "-" * len(_COLUMNS)


def line(row: Row) -> str:
    """One aligned line."""
    start = (
        f"{row.mode:<13} {row.bs:>3} {row.context:>7} {row.N:>2} {row.page_size:>4}  "
        f"{row.path:<9} {row.copy:<9} {row.generator:<8} "
    )
    if row.skipped is not None:
        return start + f"skipped: {row.skipped.splitlines()[0]}"
    return start + (
        f"{_number(row.completion_us, 13)} {_number(row.completion_p10_us, 8)} "
        f"{_number(row.completion_p90_us, 8)} {_number(row.completion_copies, 7, 2)} "
        f"{_number(row.enqueue_us, 10)} {_number(row.enqueue_copies, 7, 2)} {_number(row.gpu_us, 8)} "
        f"{_number(row.launches, 8, 0)} {_number(row.bytes and row.bytes / 1e6, 9, 2)} "
        f"{_number(row.table_bytes and row.table_bytes / 2**20, 10, 2)} {_number(row.ratio, 7, 2)} "
        f"{_number(row.floor_us, 8)} {_number(row.floor_ratio, 7, 2)}"
    )


def _number(value: float | None, width: int, digits: int = 1) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def environment(device: torch.device) -> dict[str, str]:
    """What a published number must be read with."""
    name = _processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    try:
        triton = __import__("triton").__version__
    except ImportError:
        triton = "not installed"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": name,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "commit": _commit(),
    }


def _processor() -> str:
    """As Linux calls it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} CPUs" if names else platform.processor() or platform.machine()


def _commit() -> str:
    """COMMIT names the version where the tree has no history of its own, as in the GPU check."""
    if named := os.environ.get("COMMIT"):
        return named
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
