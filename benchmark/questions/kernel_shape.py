"""Question 5: how should threads be given to elements?"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from .bench import Bench, Row
from .metadata_sets import CopySets, pairs_of
from .pairs import METHODS
from .question import Question, Table, figure, logarithmic, only, pivot, save, select, unique

CASES = (
    (1, 1024),
    (32, 16384),
    (128, 131072),
)  # requests, columns: a few KiB, what the cache holds, far above it
SHOWN = CASES[1]
BLOCKS = (64, 128, 256, 512, 1024)
WHAT = {
    "element": "thread per element",
    "2-D": "2-D grid",
    "warp a row": "warp per row",
    "piece": "block per piece of a row",
}
LIBRARY = "the library's kernel (tiles of a row, 16 bytes)"


def measure(bench: Bench) -> list[Row]:
    rows = []
    for bs, columns in CASES[:1] if bench.quick else CASES:
        sets = CopySets(bench.device.type, bs, columns, 1)
        rows += _threadings(bench, sets)
        if (bs, columns) == SHOWN or bench.quick:
            rows += _block_sizes(bench, sets)
        rows += _flattened(bench, bs, columns)
    return rows


def _threadings(bench: Bench, sets: CopySets) -> list[Row]:
    """Six strided fields, as the metadata has them: threading, bytes of an access, how sizes are passed."""
    from copy_variants import Variant, bind_variant

    pairs = pairs_of(sets)
    labels = {"what": "threading", "bs": sets.bs, "columns": sets.cols}
    rows = []
    for threading, unit, explicit in product(WHAT, (4, 16), (False, True)):
        variant = Variant(threading, unit, explicit=explicit)
        call = bind_variant(variant, pairs.srcs, pairs.dsts)
        name = f"{WHAT[threading]}, {unit} bytes, {'explicit sizes' if explicit else 'an array'}"
        pairs.check({name: call})
        rows.append({"method": name, **labels, "node_us": bench.node_us(call)})
        rows[-1] |= {"threading": threading, "unit": unit, "explicit": explicit}
    fused = METHODS["fused"](pairs)
    pairs.check({"fused": fused})
    rows.append({"method": LIBRARY, **labels, "node_us": bench.node_us(fused)})
    return rows


def _block_sizes(bench: Bench, sets: CopySets) -> list[Row]:
    from copy_variants import Variant, bind_variant

    pairs, rows = pairs_of(sets), []
    for threading, unit, block in product(WHAT, (4, 16), BLOCKS):
        call = bind_variant(Variant(threading, unit, block), pairs.srcs, pairs.dsts)
        name = f"{WHAT[threading]}, {unit} bytes"
        rows.append({"method": name, "what": "block", "bs": sets.bs, "columns": sets.cols, "block": block})
        rows[-1] |= {"node_us": bench.node_us(call), "threading": threading, "unit": unit}
    return rows


def _flattened(bench: Bench, bs: int, columns: int) -> list[Row]:
    """A table whose rows follow each other on both sides: as one row, by division, in two dimensions."""
    import torch
    from copy_variants import Variant, bind_variant

    src = torch.randint(0, 1 << 30, (bs, columns), dtype=torch.int32, device=bench.device)
    dst = torch.zeros_like(src)
    rows = []
    for name, threading, flatten in (
        ("flattened to one row", "element", True),
        ("row and column by division", "element", False),
        ("2-D grid", "2-D", False),
    ):
        for unit in (4, 16):
            call = bind_variant(Variant(threading, unit), (src,), (dst,), flatten)
            dst.zero_()
            call()
            if not torch.equal(src, dst):
                raise RuntimeError(f"{name}, {unit} bytes: did not copy")
            rows.append({"method": f"{name}, {unit} bytes", "what": "flatten", "bs": bs, "columns": columns})
            rows[-1]["node_us"] = bench.node_us(call)
    return rows


def _named(rows: list[Row]) -> list[Row]:
    return [{**row, "case": f"{row['bs']} x {row['columns']}"} for row in rows]


def tables(rows: list[Row]) -> list[Table]:
    return [
        pivot(
            _named(select(rows, what="threading")),
            "method",
            "case",
            "node_us",
            "six fields, us of a node, requests x columns",
        ),
        pivot(
            _named(select(rows, what="flatten")),
            "method",
            "case",
            "node_us",
            "one contiguous table, us of a node",
        ),
        pivot(select(rows, what="block"), "method", "block", "node_us", "us of a node by threads of a block"),
    ]


def plot(rows: list[Row], where: str, path: Path) -> None:
    drawn, (left, right) = figure("One launch that copies the six fields: GPU time of a node", where, 2)
    chosen = _named(select(rows, what="threading", explicit=False))
    cases = unique(chosen, "case")
    colours = {"element": "#b2182b", "2-D": "#35978f", "warp a row": "#9970ab", "piece": "#80b1d3"}
    for threading, unit in product(WHAT, (4, 16)):
        values = [only(chosen, case=case, threading=threading, unit=unit)["node_us"] for case in cases]
        style = {"color": colours[threading], "linestyle": "-" if unit == 16 else ":", "marker": "o"}
        left.plot(cases, values, label=f"{WHAT[threading]}, {unit} bytes", **style)
        blocks = select(rows, what="block", threading=threading, unit=unit)
        right.plot([str(r["block"]) for r in blocks], [r["node_us"] for r in blocks], **style)
    library = _named(select(rows, what="threading", method=LIBRARY))
    left.plot(
        [r["case"] for r in library],
        [r["node_us"] for r in library],
        color="#2166ac",
        marker="s",
        label="library",
    )
    shown = select(rows, what="block")[0]
    right.set(xlabel=f"threads of a block, {shown['bs']} x {shown['columns']}", ylabel="us")
    logarithmic(right)
    logarithmic(left)
    left.set(xlabel="requests x columns", ylabel="us")
    left.legend(fontsize=8, frameon=False)
    save(drawn, path)


QUESTION = Question(
    "kernel_shape",
    "Thread per element or warp per row, block size, 16 bytes, explicit sizes or an array, flatten or 2-D?",
    measure,
    tables,
    plot,
    needs_cuda=True,
)
