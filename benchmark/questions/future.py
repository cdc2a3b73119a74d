"""Question 7: what the seeds left for the future: FlashMLA's metadata, block count, streams, zero-copy."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from sglang.benchmark_metadata.measure import Call

from .bench import Bench, Row
from .metadata_sets import CopySets, GenerateSets, pairs_of
from .pairs import METHODS
from .question import Question, Table, bars, figure, save, select

BACKENDS = 7
AT = (32, 16384)
SIZES = ((1, 1024), (32, 16384), (128, 131072))
FIXED_BLOCKS = (16, 132, 1024)
PARTS = 132  # rows of FlashMLA's tile schedule: one for each multiprocessor of an H200


def measure(bench: Bench) -> list[Row]:
    bs, columns = (2, 256) if bench.quick else AT
    rows = _flashmla(bench, bs, columns) + _aliasing(bench, bs, columns)
    if bench.cuda:
        rows += _streams(bench, bs, columns) + _mapped(bench)
        for size in SIZES[:1] if bench.quick else SIZES:
            rows += _blocks(bench, *size)
    return rows


def _grouped(sets: CopySets, rank: int) -> Call:
    """The copy of the fields of one rank, vectors or tables, into all backends."""
    fields = zip(sets.live_sources, zip(*sets.sets), sets.fields)
    chosen = [(src, tuple(d[f.live] for d in dsts)) for src, dsts, f in fields if src.dim() == rank]
    return _plan(*zip(*chosen))


def _plan(srcs: Sequence[torch.Tensor], dsts: Sequence[tuple[torch.Tensor, ...]]) -> Call:
    from sgl_kernel import CopyRegion, FusedMetadataCopyPlan

    return FusedMetadataCopyPlan([CopyRegion(src, d) for src, d in zip(srcs, dsts)]).run


def _flashmla(bench: Bench, bs: int, columns: int) -> list[Row]:
    """The copy with and without FlashMLA's two tensors. Ours plans them at capture: they do not change."""
    sets = CopySets(bench.device.type, bs, columns, BACKENDS)
    device = bench.device
    extra = [
        torch.ones((PARTS, 8), dtype=torch.int32, device=device),
        torch.ones(bs + 1, dtype=torch.int32, device=device),
    ]
    own = [tuple(torch.zeros_like(t) for _ in range(BACKENDS)) for t in extra]
    fields = [tuple(s[f.live] for s in d) for d, f in zip(zip(*sets.sets), sets.fields)]
    with_them = _plan([*sets.live_sources, *extra], [*fields, *own])
    with_them()
    if not all(torch.equal(t, d) for t, dsts in zip(extra, own) for d in dsts):
        raise RuntimeError("FlashMLA's metadata was not copied")
    sets.check(with_them, "the copy with FlashMLA's metadata")
    calls = {"copied in the same launch": with_them, "planned at capture, not copied": sets.run}
    for dst, src in zip(own, extra):
        calls[f"copy_ of {BACKENDS} x {list(src.shape)}"] = partial(_copy_all, dst, src)
    rows = bench.rows(calls, what="FlashMLA metadata", case=f"{bs} x {columns}, N = {BACKENDS}")
    return [{**row, "node_us": bench.node_us(calls[row["method"]])} for row in rows]


def _copy_all(dsts: tuple[torch.Tensor, ...], src: torch.Tensor) -> None:
    for dst in dsts:
        dst.copy_(src)


def _blocks(bench: Bench, bs: int, columns: int) -> list[Row]:
    """A fixed number of blocks against one that follows the work."""
    from copy_variants import Variant, bind_variant

    pairs = pairs_of(CopySets(bench.device.type, bs, columns, 1))
    calls = {
        f"{count} blocks at most": bind_variant(
            Variant("element", 16, max_blocks=count), pairs.srcs, pairs.dsts
        )
        for count in FIXED_BLOCKS
    }
    calls["a block for each 4 KiB, as many as are resident"] = METHODS["fused"](pairs)
    pairs.check(calls)
    labels = {"what": "block count", "case": f"{bs} x {columns}, N = 1"}
    return [{"method": name, **labels, "node_us": bench.node_us(call)} for name, call in calls.items()]


def _streams(bench: Bench, bs: int, columns: int) -> list[Row]:
    """Length vectors and page tables as independent groups."""
    sets = CopySets(bench.device.type, bs, columns, BACKENDS)
    groups = [_grouped(sets, rank) for rank in (1, 2)]
    side = torch.cuda.Stream()

    def on_two_streams() -> None:
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            groups[0]()
        groups[1]()
        current.wait_stream(side)

    def one_after_the_other() -> None:
        for group in groups:
            group()

    calls = {"one launch": sets.run, "two launches": one_after_the_other}
    calls["two launches on two streams"] = on_two_streams
    pairs_of(sets).check(calls)
    return bench.rows(calls, what="streams", case=f"{bs} x {columns}, N = {BACKENDS}")


def _mapped(bench: Bench) -> list[Row]:
    """Lengths that the host wrote: read from its memory by the kernel, or sent to the device before."""
    from copy_variants import Variant, bind_variant

    rows = []
    for size in (32, 1024):
        pinned = torch.randint(0, 1 << 20, (size,), dtype=torch.int32).pin_memory()
        on_device, dst = (torch.zeros(size, dtype=torch.int32, device=bench.device) for _ in range(2))
        from_device = bind_variant(Variant(unit_bytes=16), (on_device,), (dst,))

        def send_and_copy(pinned=pinned, on_device=on_device, from_device=from_device) -> None:
            on_device.copy_(pinned, non_blocking=True)
            from_device()

        calls = {
            "kernel reads pinned host memory": bind_variant(Variant(unit_bytes=16), (pinned,), (dst,)),
            "sent to the device, then the kernel": send_and_copy,
            "kernel reads device memory": from_device,
        }
        for name, call in calls.items():
            dst.zero_()
            on_device.copy_(pinned)
            call()
            if not torch.equal(dst.cpu(), pinned):
                raise RuntimeError(f"{name}: did not copy")
        rows += bench.rows(calls, graphs=False, what="zero-copy: host memory", case=f"{size} int32")
    return rows


def _aliasing(bench: Bench, bs: int, columns: int) -> list[Row]:
    """Zero-copy of the other kind: N backends on one buffer set."""
    kind = bench.device.type
    calls: dict[str, Call] = {}
    for name, sets in (
        (f"generated into {BACKENDS} backends", GenerateSets(kind, bs, columns, BACKENDS)),
        ("generated into one table set that all alias", GenerateSets(kind, bs, columns, BACKENDS, "shared")),
        ("generated lengths, no tables", GenerateSets(kind, bs, columns, BACKENDS, "none")),
    ):
        sets.check()
        calls[name] = sets.run
    rows = bench.rows(calls, what="zero-copy: aliasing", case=f"{bs} x {columns}, N = {BACKENDS}")
    return [{**row, "node_us": bench.node_us(calls[row["method"]])} for row in rows]


def tables(rows: list[Row]) -> list[Table]:
    headers = ["what", "case", "way", "completion us", "enqueue us", "launches", "graph: GPU us", "node us"]
    columns = ("completion_us", "enqueue_us", "launches", "graph_gpu_us", "node_us")
    return [Table(headers, [[r["what"], r["case"], r["method"], *(r.get(c) for c in columns)] for r in rows])]


PANELS = (  # what is shown of which case
    ("FlashMLA metadata", None, "completion_us", "completion, us"),
    ("zero-copy: aliasing", None, "node_us", "us of a node"),
    ("streams", None, "graph_gpu_us", "in a graph, GPU us"),
    ("zero-copy: host memory", "32 int32", "completion_us", "completion, us"),
    ("block count", "1 x 1024, N = 1", "node_us", "us of a node"),
    ("block count", "32 x 16384, N = 1", "node_us", "us of a node"),
)


def plot(rows: list[Row], where: str, path: Path) -> None:
    drawn, axes = figure("What the seeds left for the future", where, 3, 2)
    for one, (what, case, key, unit) in zip(axes, PANELS):
        shown = select(rows, what=what, **({"case": case} if case else {}))
        if not shown or shown[0].get(key) is None:
            one.set_visible(False)
            continue
        labels = ["\n".join(textwrap.wrap(row["method"], 28)) for row in shown]
        bars(one, labels, [row[key] for row in shown], ["#2166ac"] * len(shown), unit)
        one.set_title(f"{what}\n{shown[0]['case']}", fontsize=9)
    save(drawn, path)


QUESTION = Question(
    "future",
    "FlashMLA's metadata, adaptive block count, streams, zero-copy: worth it?",
    measure,
    tables,
    plot,
)
