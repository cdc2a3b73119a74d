"""An exact top-k of score rows in Triton, for where the kernel library's `topk_slots` is not installed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch_triton import dependent_launch, wait_for_inputs

MANY_ROWS = 128  # fewer do not fill the device, so that each should be fast


@triton.jit
def _table_row(table_rows, row, first_row, rows_per_req):
    """The row's row of the page table; without table_rows the table is that of the T rows themselves."""
    return row if table_rows is None else tl.load(table_rows + (first_row + row) // rows_per_req).to(tl.int64)


@triton.jit
def _ordered_keys(scores, columns, live):
    """Scores as uint32 that are ordered alike; -0.0 counts as 0.0."""
    score = tl.load(scores + columns, mask=live, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def _kth_in_registers(scores, length, topk, TILE: tl.constexpr):
    """Of a row that fits one tile: a key, and how many of those equal to it are among the top-k. The k-th
    highest is found bit by bit, as the greatest number that at least k keys reach, unless fewer bits part
    exactly k from the rest."""
    columns = tl.arange(0, TILE)
    live = columns < length
    keys = tl.where(live, _ordered_keys(scores, columns, live), 0)  # nobody asks for keys of at least 0
    threshold = tl.zeros((), dtype=tl.uint32)
    reached = length
    bit = tl.full((), 1 << 31, dtype=tl.uint32)
    while (bit > 0) & (reached != topk):
        count = tl.sum((keys >= (threshold | bit)).to(tl.int32), axis=0)
        enough = count >= topk
        threshold = tl.where(enough, threshold | bit, threshold)
        reached = tl.where(enough, count, reached)
        bit = bit >> 1
    need = topk
    if reached != topk:  # several keys equal the k-th
        need = topk - tl.sum((keys > threshold).to(tl.int32), axis=0)
    return threshold, need


@triton.jit
def _kth_by_digits(scores, length, topk, BLOCK: tl.constexpr):
    """The same of a row of any length, which is read four times, each time for a digit of 256 bins (a radix
    select)."""
    offsets = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)
    threshold = tl.zeros((), dtype=tl.uint32)  # the digits of the k-th highest key known so far
    need = tl.zeros((), dtype=tl.int32) + topk  # keys still to be taken among those with these digits
    for shift in tl.static_range(24, -1, -8):
        histogram = tl.zeros((256,), dtype=tl.int32)
        for start in range(0, length, BLOCK):
            columns = start + offsets
            alike = columns < length
            keys = _ordered_keys(scores, columns, alike)
            if shift < 24:
                alike = alike & ((keys >> (shift + 8)) == (threshold >> (shift + 8)))
            histogram += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=alike)
        above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)  # keys with a higher digit
        found = (above < need) & (need <= above + histogram)  # true for one bin
        threshold += tl.sum(tl.where(found, bins, 0), axis=0).to(tl.uint32) << shift
        need -= tl.sum(tl.where(found, above, 0), axis=0)
    return threshold, need


@triton.jit
def _store_selected(scores, page_table, slots, length, threshold, need, BLOCK: tl.constexpr):
    """The slots of all keys above the threshold and of the first `need` equal to it, by position."""
    taken = tl.zeros((), dtype=tl.int32)
    equals = tl.zeros((), dtype=tl.int32)
    for start in range(0, length, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < length
        keys = _ordered_keys(scores, columns, live)
        above = live & (keys > threshold)
        equal = live & (keys == threshold)
        # Both are counted in one scan, each in its half of the integer.
        counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
        pick = above | (equal & (equals + (counts >> 16) <= need))
        before = tl.minimum(equals, need)
        rank = taken + (counts & 0xFFFF) + tl.minimum(equals + (counts >> 16), need) - before - 1
        tl.store(slots + rank, tl.load(page_table + columns, mask=pick, other=-1), mask=pick)
        total = tl.sum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
        equals += total >> 16
        taken += (total & 0xFFFF) + tl.minimum(equals, need) - before


# The stride of the scores is a multiple of 16, which the compiler then knows.
@triton.jit(do_not_specialize=["width", "first_row", "rows_per_req"])
def _topk_kernel(
    scores,  # [T, >= width], float32
    page_table,  # [R, W], int32
    table_rows,  # [all rows / rows_per_req], int32 or int64, or None
    lengths,  # [T], int32
    slots,  # [T, topk], int32: every element is written
    first_row,  # of the T rows among all
    rows_per_req,
    width,
    scores_stride,
    table_stride,
    topk,
    padding_slot,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row. Finds the k-th highest score, then writes the slots of all scores above it and
    of the first ones equal to it, in the order of their positions."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lengths + row), width)
    page_table += _table_row(table_rows, row, first_row, rows_per_req) * table_stride
    scores += row * scores_stride
    slots += row * topk
    if length <= topk:
        for start in range(0, topk, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            page = tl.load(page_table + columns, mask=columns < length, other=padding_slot)
            tl.store(slots + columns, page, mask=columns < topk)
    else:
        if length <= TILE // 2:
            threshold, need = _kth_in_registers(scores, length, topk, TILE // 2)
        elif length <= TILE:
            threshold, need = _kth_in_registers(scores, length, topk, TILE)
        else:
            threshold, need = _kth_by_digits(scores, length, topk, BLOCK)
        _store_selected(scores, page_table, slots, length, threshold, need, BLOCK)


@dataclass(frozen=True)
class TopkTile:
    """How a program of the top-k works on its row."""

    keys: int  # that its registers hold: a longer row is read again and again
    block: int  # keys that it stores the slots of in one go
    warps: int

    @classmethod
    def choose(cls, rows: int) -> TopkTile:
        return cls(8192, 1024, 4) if rows >= MANY_ROWS else cls(8192, 4096, 8)


def topk_slots(
    scores: torch.Tensor,  # [T, >= width], float32; a row stride that is a multiple of 16
    page_table: torch.Tensor,  # [R, >= width], int32
    table_rows: torch.Tensor | None,  # [all rows / rows_per_req], int32 or int64; None: row t's is t
    lengths: torch.Tensor,  # [T], int32
    slots: torch.Tensor,  # [T, topk], int32: every element is written
    *,
    width: int,
    first_row: int = 0,  # of the T rows among all
    rows_per_req: int = 1,
    padding_slot: int = -1,
) -> None:
    """As the kernel library's `topk_slots`: of each row the slots of the highest scores, by position."""
    rows, topk = slots.shape
    tile = TopkTile.choose(rows)
    _topk_kernel[(rows,)](
        scores,
        page_table,
        table_rows,
        lengths,
        slots,
        first_row,
        rows_per_req,
        width,
        scores.stride(0),
        page_table.stride(0),
        topk,
        padding_slot,
        BLOCK=tile.block,
        TILE=tile.keys,
        num_warps=tile.warps,
        **dependent_launch(slots.device),
    )
