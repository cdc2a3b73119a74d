"""Question 9: what is left above the floor, on the host and on the device?"""

from __future__ import annotations

from pathlib import Path

import torch
from sglang.benchmark_metadata.cases import BenchCase, BenchInputs
from sglang.benchmark_metadata.measure import Call
from sglang.benchmark_metadata.routes import Route, Subject
from sglang.srt.layers.attention.nsa.metadata import MetadataMode
from sglang.srt.layers.attention.nsa.metadata_generators import Destination, FusedGenerator

from .bench import Bench, Row
from .claims import cases as claimed
from .question import Question, Table, bars, figure, logarithmic, save, select

LONG = BenchCase(MetadataMode.DECODE, 128, 131072, 7)
PATHS = (
    ("replicate", "fused"),
    ("replicate", "direct"),
    ("shared", "-"),
    ("in_graph", "-"),
    ("indirect", "-"),
)


def measure(bench: Bench) -> list[Row]:
    cases = claimed(bench.quick) + ([LONG] if bench.cuda and not bench.quick else [])
    device = [
        {**row, "what": "device"}
        for row in bench.metadata(cases)
        if (row["path"], row["copy"]) in PATHS and row["generator"] == "fused"
    ]
    return device + _ladder(bench)


def _ladder(bench: Bench) -> list[Row]:
    """The host's way to a launch, each rung with one thing more than the one before."""
    case = claimed(bench.quick)[-1]
    inputs = BenchInputs(case, bench.device)
    inputs.load(0)
    shared = Subject(Route("shared"), case, inputs, bench.device)
    shared.check()
    generation = FusedGenerator(inputs.metadata_inputs, [Destination(shared.metadata.backends[case.bs][0])])
    small = [torch.zeros(case.bs, dtype=torch.int32, device=bench.device) for _ in range(2)]
    calls: dict[str, Call] = {"a Python call that does nothing": _nothing}
    if bench.cuda:
        calls["launch of an empty kernel (torch)"] = lambda: torch.cuda._sleep(0)
    operator, builtin, max_len = generation.plan.run, generation.run, case.max_len
    calls |= {
        f"copy_ of {case.bs} int32": lambda: small[0].copy_(small[1]),
        "the generation's operator (layout shared)": lambda: operator(max_len),
        "the generation's builtin (layout shared)": lambda: builtin(max_len),
        "the replay call of the server (shared)": shared.call,
    }
    for name, path, copy in (("direct", "replicate", "direct"), ("fused", "replicate", "fused")):
        subject = Subject(Route(path, copy), case, inputs, bench.device)
        subject.check()
        calls[f"the replay call of the server (replicate, {name})"] = subject.call
    labels = {"what": "host", "bs": case.bs, "context": case.context, "N": case.backends}
    rows = bench.rows(calls, **labels)
    return [{**row, "loop_us": us} for row, us in zip(rows, bench.loops_us(list(calls.values())))]


def _nothing() -> None:
    pass


def tables(rows: list[Row]) -> list[Table]:
    host = select(rows, what="host")
    ladder = Table(
        ["host", "enqueue us", "in a loop us", "completion us", "replay of its graph: enqueue us"],
        [
            [r["method"], r["enqueue_us"], r["loop_us"], r["completion_us"], r.get("graph_enqueue_us")]
            for r in host
        ],
    )
    device = Table(
        [
            "requests x context, N",
            "path",
            "GPU us" if rows[0]["device"] == "cuda" else "completion us",
            "floor us",
            "x floor",
            "MB",
            "enqueue us",
        ],
        [
            [
                f"{r['bs']} x {r['context']}, {r['N']}",
                _name(r),
                _figure_of(r),
                r["floor_us"],
                _ratio(r),
                r["bytes"] / 1e6,
                r["enqueue_us"],
            ]
            for r in select(rows, what="device")
        ],
    )
    return [ladder, device]


def _name(row: Row) -> str:
    return row["path"] if row["copy"] == "-" else f"{row['path']}, {row['copy']}"


def _figure_of(row: Row) -> float | None:
    return row["gpu_us"] if row["device"] == "cuda" else row["completion_us"]


def _ratio(row: Row) -> str | None:
    return None if row["floor_ratio"] is None else f"{row['floor_ratio']:.2f}"


def plot(rows: list[Row], where: str, path: Path) -> None:
    drawn, (left, right) = figure("What is left above the floor: host (one call) and device", where, 2)
    host = select(rows, what="host")
    bars(
        left,
        [r["method"].replace(", ", ",\n").replace(" (", "\n(") for r in host],
        [r["enqueue_us"] for r in host],
        ["#2166ac"] * len(host),
        "us to enqueue",
    )
    device = [r for r in select(rows, what="device") if _figure_of(r) is not None and r["floor_us"]]
    labels = [f"{_name(r)}\n{r['bs']} x {r['context']}, N {r['N']}" for r in device]
    places = range(len(device))[::-1]
    right.barh(places, [_figure_of(r) for r in device], color="#9ecae1", height=0.8, label="measured")
    right.barh(places, [r["floor_us"] for r in device], color="#2166ac", height=0.4, label="floor")
    right.set_yticks(places, labels, fontsize=6)
    logarithmic(right, x=True, y=False)
    right.set(xlabel="us")
    right.legend(fontsize=8, frameon=False)
    drawn.set_size_inches(11, 6.2)
    save(drawn, path)


QUESTION = Question(
    "floors", "What is left above the floor, on the host and on the device?", measure, tables, plot
)
