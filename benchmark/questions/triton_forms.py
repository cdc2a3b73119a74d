"""The forms that the batched Triton copy of the seeds took, from the slowest to the planned one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from sglang.benchmark_metadata.measure import Call
from sglang.benchmark_metadata.triton_batched_copy import _BLOCK, BatchedCopy, _copy_kernel

from .pairs import Pairs

BLOCK = 1024


@triton.jit
def _one_kernel(src, dst, size, BLOCK: tl.constexpr):  # int32 pointers, elements
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + offset, tl.load(src + offset, mask=offset < size), mask=offset < size)


@triton.jit
def _many_kernel(srcs, dsts, sizes, BLOCK: tl.constexpr):  # [copies], int64 each: pointers, elements
    copy = tl.program_id(0)
    src = tl.load(srcs + copy).to(tl.pointer_type(tl.int32))
    dst = tl.load(dsts + copy).to(tl.pointer_type(tl.int32))
    size = tl.load(sizes + copy)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + offset, tl.load(src + offset, mask=offset < size), mask=offset < size)


def launch_each(pairs: Pairs) -> Call:
    """One launch for each tensor."""
    triples = [(src, dst, src.numel()) for src, dst in zip(pairs.srcs, pairs.dsts)]

    def call() -> None:
        for src, dst, size in triples:
            _one_kernel[(-(-size // BLOCK),)](src, dst, size, BLOCK=BLOCK)

    return call


def pointer_lists(pairs: Pairs) -> list[list[int]]:
    """What a table is made of: sources, destinations, elements."""
    tensors = (pairs.srcs, pairs.dsts)
    return [*([t.data_ptr() for t in side] for side in tensors), [src.numel() for src in pairs.srcs]]


def table_each_call(pairs: Pairs) -> Call:
    """One launch; its three tables are built and sent to the device by every call, as `torch.tensor` does."""
    device, largest = pairs.srcs[0].device, max(src.numel() for src in pairs.srcs)
    grid = (len(pairs.srcs), -(-largest // BLOCK))

    def call() -> None:
        tables = [torch.tensor(values, dtype=torch.int64, device=device) for values in pointer_lists(pairs)]
        _many_kernel[grid](*tables, BLOCK=BLOCK)

    return call


def table_once(pairs: Pairs) -> Call:
    """One launch, the tables built once."""
    device, largest = pairs.srcs[0].device, max(src.numel() for src in pairs.srcs)
    tables = [torch.tensor(values, dtype=torch.int64, device=device) for values in pointer_lists(pairs)]
    grid = (len(pairs.srcs), -(-largest // BLOCK))
    return lambda: _many_kernel[grid](*tables, BLOCK=BLOCK)


def compiled_launch(pairs: Pairs) -> Call:
    """The planned table, and Triton's compiled kernel called itself: no search for it in every call."""
    copy = BatchedCopy(pairs.regions)
    launch = _copy_kernel[copy.grid](copy.table, -1, BLOCK=_BLOCK)[(*copy.grid, 1)]
    return lambda: launch(copy.table, -1, _BLOCK)


FORMS: tuple[Callable[[Pairs], Call], ...] = (launch_each, table_each_call, table_once, compiled_launch)
