"""Question 1: is `copy_` optimal for this?"""

from __future__ import annotations

from pathlib import Path

from .bench import Bench, Point, Row
from .pairs import COLOURS, Pairs, methods_on
from .question import Question, Table, figure, logarithmic, pivot, save, select, size_name, unique

TENSORS = (1, 3, 7, 15, 35, 63)
SIZES = (128, 2048, 64 << 10, 1 << 20, 16 << 20)  # bytes of each tensor
AT = (7, 2048)  # where one sweep crosses the other


def measure(bench: Bench) -> list[Row]:
    sizes = SIZES[:2] if bench.quick else SIZES if bench.cuda else SIZES[:-1]
    shapes = [(n, AT[1]) for n in (TENSORS[:3] if bench.quick else TENSORS)]
    shapes += [(AT[0], size) for size in sizes if size != AT[1]]
    points = []
    for tensors, size in shapes:
        pairs = Pairs.vectors([size // 4] * tensors, bench.device)
        labels = {"tensors": tensors, "bytes_each": size}
        points.append(Point(methods_on(bench.device, pairs), labels))
    return bench.sweep(points)


def tables(rows: list[Row]) -> list[Table]:
    here = select(rows, tensors=AT[0], bytes_each=AT[1])
    headers = [
        f"{AT[0]} tensors of {size_name(AT[1])}",
        "completion us",
        "enqueue us",
        "GPU us",
        "launches",
        "in a graph, GPU us",
    ]
    columns = ("completion_us", "enqueue_us", "gpu_us", "launches", "graph_gpu_us")
    detail = Table(headers, [[row["method"], *(row.get(c) for c in columns)] for row in here])
    by_count = pivot(
        select(rows, bytes_each=AT[1]),
        "method",
        "tensors",
        "completion_us",
        "completion us by number of tensors",
    )
    sized = sorted(select(rows, tensors=AT[0]), key=lambda row: row["bytes_each"])
    sized = [{**row, "each": size_name(row["bytes_each"])} for row in sized]
    by_size = pivot(sized, "method", "each", "completion_us", f"completion us by bytes of each of {AT[0]}")
    return [detail, by_count, by_size]


def plot(rows: list[Row], where: str, path: Path) -> None:
    drawn, (left, right) = figure("Copying several tensors: completion of one call", where, 2)
    for method, colour in COLOURS.items():
        for axes, label, fixed in (
            (left, "tensors", {"bytes_each": AT[1]}),
            (right, "bytes_each", {"tensors": AT[0]}),
        ):
            points = sorted(select(rows, method=method, **fixed), key=lambda row: row[label])
            if points:
                xs, ys = [p[label] for p in points], [p["completion_us"] for p in points]
                axes.plot(xs, ys, marker="o", color=colour, label=method)
    logarithmic(left)
    logarithmic(right, x=True)
    left.set(xlabel=f"tensors of {size_name(AT[1])}", ylabel="completion, us (median)")
    sizes = unique(sorted(rows, key=lambda row: row["bytes_each"]), "bytes_each")
    right.set_xticks(sizes, [size_name(size) for size in sizes])
    right.set(xlabel=f"bytes of each of {AT[0]} tensors")
    left.legend(fontsize=8, frameon=False)
    save(drawn, path)


QUESTION = Question("copy_methods", "Is `copy_` optimal for this?", measure, tables, plot)
