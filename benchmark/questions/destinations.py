"""Question 6: what does the fused kernel save by destinations, and where do bytes overtake launches?"""

from __future__ import annotations

from pathlib import Path

from .bench import Bench, Point, Row
from .metadata_sets import CopySets, pairs_of
from .pairs import COLOURS, methods_on
from .question import Question, Table, figure, logarithmic, save, select

DESTINATIONS = (1, 3, 7, 15)
AT = (32, 16384)  # requests, columns
BACKENDS = 7
SIZES = (
    (1, 1024),
    (8, 4096),
    (8, 16384),
    (32, 16384),
    (32, 65536),
    (32, 131072),
    (128, 65536),
    (128, 131072),
)
METHODS = ("copy_", "foreach", "fused")


def measure(bench: Bench) -> list[Row]:
    if bench.quick:
        shapes = [(n, 2, 256) for n in DESTINATIONS[:2]]
    else:
        shapes = [(n, *AT) for n in DESTINATIONS]
        sizes = SIZES if bench.cuda else SIZES[:6]
        shapes += [(BACKENDS, *size) for size in sizes if size != AT]
    points = []
    for n, bs, columns in shapes:
        sets = CopySets(bench.device.type, bs, columns, n)
        calls = methods_on(bench.device, pairs_of(sets), METHODS)
        calls["fused"] = sets.run  # reads every source once, for all destinations
        sets.check(sets.run, "fused")
        labels = {"N": n, "bs": bs, "columns": columns, "bytes": sets.bytes_moved}
        labels |= {"copies": len(sets.flat_dsts), "bandwidth_us": bench.bandwidth_us(sets.bytes_moved)}
        labels["node_us"] = bench.node_us(sets.run)
        points.append(Point(calls, labels))
    return bench.sweep(points)


def _sized(rows: list[Row], method: str) -> list[Row]:
    """One number of destinations, by size."""
    n = BACKENDS if select(rows, N=BACKENDS) else rows[0]["N"]
    return sorted(select(rows, method=method, N=n), key=lambda row: row["bytes"])


def _counted(rows: list[Row], method: str) -> list[Row]:
    """One size, by number of destinations."""
    return select(rows, method=method, bs=rows[0]["bs"], columns=rows[0]["columns"])


def tables(rows: list[Row]) -> list[Table]:
    counted = zip(*(_counted(rows, method) for method in METHODS))
    by_count = []
    for copy, foreach, fused in counted:
        completion = [row["completion_us"] for row in (copy, foreach, fused)]
        on_gpu = [copy["gpu_us"], fused["gpu_us"], fused["bandwidth_us"]]
        saved = copy["completion_us"] - fused["completion_us"]
        by_count.append([fused["N"], fused["copies"], *completion, saved, *on_gpu])
    keys = ("completion_us", "enqueue_us", "node_us", "bandwidth_us")
    by_size = []
    for copy, fused in zip(_sized(rows, "copy_"), _sized(rows, "fused")):
        share = 100 * fused["node_us"] / fused["completion_us"]
        name = f"{fused['bs']} x {fused['columns']}"
        by_size.append(
            [name, fused["bytes"] / 1e6, copy["completion_us"], *(fused[key] for key in keys), share]
        )
    headers = ["N", "copies", "copy_ us", "foreach us", "fused us", "saved us"]
    headers += ["copy_ GPU us", "fused GPU us", "bytes at bandwidth us"]
    sized = [f"N = {_sized(rows, 'fused')[0]['N']}, requests x columns", "MB", "copy_ us", "fused us"]
    sized += ["fused enqueue us", "fused node us", "bytes at bandwidth us", "node of completion %"]
    return [Table(headers, by_count), Table(sized, by_size)]


def plot(rows: list[Row], where: str, path: Path) -> None:
    drawn, (left, right) = figure("One copy of the metadata into N backends: completion", where, 2)
    for method in METHODS:
        style = {"marker": "o", "color": COLOURS[method], "label": method}
        counted, sized = _counted(rows, method), _sized(rows, method)
        left.plot([r["N"] for r in counted], [r["completion_us"] for r in counted], **style)
        right.plot([r["bytes"] / 1e6 for r in sized], [r["completion_us"] for r in sized], **style)
    fused = _sized(rows, "fused")
    megabytes = [r["bytes"] / 1e6 for r in fused]
    right.plot(
        megabytes, [r["node_us"] for r in fused], "--", color=COLOURS["fused"], label="fused: on the GPU"
    )
    right.plot(megabytes, [r["bandwidth_us"] for r in fused], ":", color="black", label="at full bandwidth")
    size = f"{rows[0]['bs']} x {rows[0]['columns']}"
    left.set(xlabel=f"destinations N, {size}", ylabel="us (median)", ylim=(0, None))
    logarithmic(right, x=True)
    right.set(xlabel=f"MB read and written, N = {fused[0]['N']}")
    right.legend(fontsize=8, frameon=False)
    save(drawn, path)


QUESTION = Question(
    "destinations",
    "What does the fused kernel save at 1, 3, 7, 15 destinations; is it bandwidth or launches?",
    measure,
    tables,
    plot,
)
