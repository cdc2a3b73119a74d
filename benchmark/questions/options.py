"""Question 4: what do options A (cat in torch), B (a Triton kernel), C (streams) cost and save?"""

from __future__ import annotations

from pathlib import Path

import torch
from sglang.benchmark_metadata.measure import Call

from .bench import Bench, Point, Row
from .metadata_sets import CopySets, pairs_of
from .pairs import METHODS, Pairs
from .question import Question, Table, figure, save, select

BS, COLUMNS = 32, 16384
BACKENDS = (1, 3, 7)
NAMES = {
    "copy_": "copy_ of each field",
    "foreach": "foreach",
    "cat": "A: cat, then copy_ out of it",
    "triton": "B: Triton, one launch",
    "streams": "C: streams made once, joined by events",
    "fused": "the library's kernel",
}
AS_WRITTEN_A = "A as written: cat of destinations .copy_(cat of sources)"
AS_WRITTEN_C = "C as written: streams made by each call, the host waits for each"
HOST_WAITS_C = "C, streams made once, the host waits for each"


def copy_as_written(pairs: Pairs) -> Call:
    """`torch.cat` of the destinations is a new tensor: the destinations themselves never change."""

    def call() -> None:
        torch.cat([dst.reshape(-1) for dst in pairs.dsts]).copy_(
            torch.cat([src.reshape(-1) for src in pairs.srcs])
        )

    return call


def copy_and_wait(pairs: Pairs, make_streams: bool) -> Call:
    """A stream for each tensor, as the seeds sketch it: nothing orders them behind the current stream."""
    made = [] if make_streams else [torch.cuda.Stream() for _ in pairs.srcs]

    def call() -> None:
        streams = [torch.cuda.Stream() for _ in pairs.srcs] if make_streams else made
        for stream, dst, src in zip(streams, pairs.dsts, pairs.srcs):
            with torch.cuda.stream(stream):
                dst.copy_(src)
        for stream in streams:
            stream.synchronize()

    return call


def measure(bench: Bench) -> list[Row]:
    bs, columns = (2, 256) if bench.quick else (BS, COLUMNS)
    points, right = [], {}
    for n in BACKENDS[:1] if bench.quick else BACKENDS:
        sets = CopySets(bench.device.type, bs, columns, n)
        pairs = pairs_of(sets)
        chosen = [m for m in NAMES if bench.cuda or m not in ("triton", "streams")]
        calls = {NAMES[method]: METHODS[method](pairs) for method in chosen}
        calls[NAMES["fused"]] = sets.run  # reads every source once, for all backends
        if bench.cuda:
            calls[HOST_WAITS_C] = copy_and_wait(pairs, make_streams=False)
            calls[AS_WRITTEN_C] = copy_and_wait(pairs, make_streams=True)
        pairs.check(calls)
        written = copy_as_written(pairs)
        right[n] = pairs.holds(written)
        labels = {"N": n, "bs": bs, "columns": columns, "tensors": len(pairs.srcs)}
        points.append(Point(calls | {AS_WRITTEN_A: written}, labels))
    rows = bench.sweep(points, eager_only=(HOST_WAITS_C, AS_WRITTEN_C))
    return [{**row, "copies": row["method"] != AS_WRITTEN_A or right[row["N"]]} for row in rows]


def tables(rows: list[Row]) -> list[Table]:
    headers = [
        "N",
        "option",
        "copies?",
        "completion us",
        "enqueue us",
        "GPU us",
        "launches",
        "graph: completion us",
        "graph: GPU us",
    ]
    columns = ("completion_us", "enqueue_us", "gpu_us", "launches", "graph_completion_us", "graph_gpu_us")
    return [
        Table(
            headers,
            [
                [r["N"], r["method"], "yes" if r["copies"] else "no", *(r.get(c) for c in columns)]
                for r in rows
            ],
        )
    ]


def plot(rows: list[Row], where: str, path: Path) -> None:
    n = 7 if select(rows, N=7) else rows[0]["N"]
    shown = select(rows, N=n)
    size = f"{shown[0]['bs']} x {shown[0]['columns']}"
    title = f"Options of the seeds, {shown[0]['tensors']} copies (N = {n}, {size})"
    drawn, (axes,) = figure(title, where)
    places = range(len(shown))[::-1]
    for offset, key, label, colour in (
        (0.2, "completion_us", "eager: completion", "#b2182b"),
        (-0.2, "graph_completion_us", "replay of a graph: completion", "#2166ac"),
    ):
        found = [(p, r[key]) for p, r in zip(places, shown) if r.get(key) is not None]
        if found:
            axes.barh(
                [p + offset for p, _ in found], [v for _, v in found], height=0.38, color=colour, label=label
            )
            for p, v in found:
                axes.text(v, p + offset, f" {v:.0f}", va="center", fontsize=8)
    axes.set_yticks(places, [r["method"].replace(": ", ":\n", 1) for r in shown], fontsize=8)
    axes.set_xlabel("us")
    axes.legend(fontsize=8, frameon=False)
    save(drawn, path)


QUESTION = Question(
    "options", "What do options A, B and C cost and save, eagerly and inside a graph?", measure, tables, plot
)
