"""Question 3: what do caching the transformed table and the strided indices give?

A backend reads the page of every page_size-th slot of page_table_1. Published SGLang computes the column
indices anew (`torch.arange`) and gathers; the seeds cached the indices, and the transformed table of a step.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from sglang.benchmark_metadata.cases import TOPK
from sglang.benchmark_metadata.measure import Call

from .bench import Bench, Point, Row
from .question import Question, Table, bars, figure, save, select

PAGE = 64
CASES = ((1, 16384), (32, 16384), (32, 131072))  # requests, columns
BACKENDS = 7
SHOWN = CASES[1]


@functools.cache
def _indices(columns: int, device: torch.device) -> torch.Tensor:  # [ceil(columns / page)], int32
    return torch.arange(0, columns, PAGE, dtype=torch.int32, device=device)


def _with_arange(table: torch.Tensor) -> torch.Tensor:  # [bs, columns] -> [bs, ceil(columns / page)], int32
    indices = torch.arange(0, table.shape[1], PAGE, dtype=torch.int32, device=table.device)
    return table[:, indices] // PAGE


def _with_cached_indices(table: torch.Tensor) -> torch.Tensor:
    return table[:, _indices(table.shape[1], table.device)] // PAGE


def _with_slice(table: torch.Tensor) -> torch.Tensor:
    return table[:, ::PAGE] // PAGE


TRANSFORMS = {
    "arange each time": _with_arange,
    "indices cached": _with_cached_indices,
    "a strided view": _with_slice,
}


def measure(bench: Bench) -> list[Row]:
    points = []
    for bs, columns in CASES[:1] if bench.quick else CASES:
        table = torch.randint(0, 1 << 20, (bs, columns), dtype=torch.int32, device=bench.device)
        reference = _with_arange(table)
        for transform in TRANSFORMS.values():
            if not torch.equal(transform(table), reference):
                raise RuntimeError(f"{transform.__name__}: another table than the reference")
        calls: dict[str, Call] = {}
        for name, transform in TRANSFORMS.items():
            calls[f"{BACKENDS} tables, {name}"] = functools.partial(_repeat, transform, table)
        for name, transform in TRANSFORMS.items():
            calls[f"1 table for all, {name}"] = functools.partial(transform, table)
        calls |= _generations(bs, columns, bench.device)
        points.append(Point(calls, {"bs": bs, "columns": columns}))
    return bench.sweep(points)


def _repeat(transform, table: torch.Tensor) -> None:
    for _ in range(BACKENDS):
        transform(table)


def _generations(bs: int, columns: int, device: torch.device) -> dict[str, Call]:
    """The project's kernel for one set of metadata, with and without that table: what it costs there."""
    from sgl_kernel import MetadataDestination, NSAMetadataGeneratePlan

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    def generation(real_page_table: torch.Tensor | None) -> Call:
        return NSAMetadataGeneratePlan(
            mode=0,
            bs=bs,
            seq_lens=torch.full((bs,), columns, dtype=torch.int32, device=device),
            req_pool_indices=torch.arange(bs, dtype=torch.int32, device=device),
            req_to_token=zeros(bs, columns),
            destinations=[
                MetadataDestination(
                    cache_seqlens=zeros(bs),
                    cu_seqlens_k=zeros(bs + 1),
                    page_table_1=zeros(bs, columns),
                    nsa_cache_seqlens=zeros(bs),
                    nsa_cu_seqlens_k=zeros(bs + 1),
                    real_page_table=real_page_table,
                )
            ],
            page_size=PAGE,
            topk=TOPK,
        ).run

    return {
        "generation of all fields": generation(zeros(bs, -(-columns // PAGE))),
        "generation without that table": generation(None),
    }


def tables(rows: list[Row]) -> list[Table]:
    headers = ["requests x columns", "way", "completion us", "enqueue us", "GPU us", "launches"]
    return [
        Table(
            headers,
            [
                [
                    f"{r['bs']} x {r['columns']}",
                    r["method"],
                    r["completion_us"],
                    r["enqueue_us"],
                    r["gpu_us"],
                    r["launches"],
                ]
                for r in rows
            ],
        )
    ]


def plot(rows: list[Row], where: str, path: Path) -> None:
    shown = select(rows, bs=SHOWN[0], columns=SHOWN[1]) or rows
    size = f"{shown[0]['bs']} x {shown[0]['columns']}"
    title = f"The table of pages, {size} columns, {BACKENDS} backends: completion"
    drawn, (axes,) = figure(title, where)
    colours = ["#b2182b"] * 3 + ["#ef8a62"] * 3 + ["#2166ac"] * 2
    bars(axes, [r["method"] for r in shown], [r["completion_us"] for r in shown], colours)
    save(drawn, path)


QUESTION = Question(
    "page_tables", "What did caching the transform table and the strided indices give?", measure, tables, plot
)
