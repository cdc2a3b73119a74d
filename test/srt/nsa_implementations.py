"""Every implementation of indexer and sparse MLA, and the indexer's inputs.

The Triton kernels run on a GPU (`-m gpu`), or on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from sglang.srt.layers.attention.nsa import indexer, sparse_mla

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = {"torch": "cpu", "torch_cuda": "cuda", "triton": "cpu" if INTERPRETED else "cuda"}
IMPLEMENTATIONS = [
    "torch",
    pytest.param("torch_cuda", marks=pytest.mark.gpu),
    pytest.param("triton", marks=[] if INTERPRETED else pytest.mark.gpu),
]


@dataclass(frozen=True)
class Implementation:
    """The two functions under test, and where to run them."""

    select_topk: Callable[..., torch.Tensor]
    sparse_mla: Callable[..., torch.Tensor]
    device: str


def implementation(name: str, dtype: torch.dtype = torch.float32) -> Implementation:
    if name != "triton":
        return Implementation(indexer.select_topk, sparse_mla.sparse_mla, DEVICE[name])
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as if its bits were integers")
    from sglang.srt.layers.attention.nsa import indexer_triton, sparse_mla_triton

    return Implementation(indexer_triton.select_topk, sparse_mla_triton.sparse_mla, DEVICE[name])


@dataclass(frozen=True)
class SelectCase:
    """Of the indexer: rows of `lengths`; with `table_rows` some rows share a page table row."""

    name: str
    lengths: list[int]
    topk: int = 16
    heads: int = 4
    dim: int = 32
    columns: int = 80
    table_rows: list[int] | None = None
    dtype: torch.dtype = torch.float32
    values: int = 4  # integers of -values..values: every sum is exact, and ties abound
    seed: int = 0


@dataclass(frozen=True)
class SelectInputs:
    q: torch.Tensor
    weights: torch.Tensor
    keys: torch.Tensor
    page_table: torch.Tensor
    table_rows: torch.Tensor | None
    lengths: torch.Tensor

    def on(self, device: str) -> tuple:
        return tuple(None if t is None else t.to(device) for t in vars(self).values())


def select_inputs(case: SelectCase) -> SelectInputs:
    """Integer-valued inputs. Dead columns hold absurd slots, unused slots (slot 0 too) hold NaN."""
    g = torch.Generator().manual_seed(case.seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-case.values, case.values + 1, shape, generator=g).to(case.dtype)

    rows = len(case.lengths)
    owners = case.table_rows or list(range(rows))
    live = [0] * (max(owners) + 1)
    for owner, length in zip(owners, case.lengths):
        live[owner] = max(live[owner], length)
    page_table = torch.where(torch.rand(len(live), case.columns, generator=g) < 0.5, -7, 2**31 - 1).int()
    slots = torch.randperm(sum(live) + 40, generator=g) + 1
    keys = torch.full((len(slots) + 1, case.dim), float("nan"), dtype=case.dtype)
    start = 0
    for owner, length in enumerate(live):
        own = slots[start : start + length]
        page_table[owner, :length] = own.int()
        keys[own] = integers(length, case.dim)
        start += length
    q = integers(rows, case.heads, case.dim)
    weights = torch.randint(-2, 3, (rows, case.heads), generator=g).float()
    table_rows = None if case.table_rows is None else torch.tensor(case.table_rows)
    return SelectInputs(q, weights, keys, page_table, table_rows, torch.tensor(case.lengths).int())
