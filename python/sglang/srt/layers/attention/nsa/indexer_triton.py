"""The lightning indexer in Triton: scores over the paged keys, then an exact top-k. Equals `indexer.py`.

Two launches for any number of rows. The grids depend on shapes alone and programs past a row's length end
at once, so the calls can be captured in a CUDA graph and cost what the live lengths cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch_triton import dependent_launch, wait_for_inputs

# Scores [rows, width] held at once, in elements (float32): only long prefills need more than one chunk.
CHUNK_ELEMENTS = 1 << 26
MANY_ROWS = 128  # for the top-k: fewer do not fill the device, so that each should be fast
SCORES_WARPS = 4
MAX_BLOCK_T = 32  # rows that a program of the scores takes
FILLING_ROWS = 16  # fewer blocks of rows than that leave multiprocessors idle at short widths


@triton.jit
def _table_row(table_rows, row, first_row, rows_per_req):
    """The row's row of the page table; without table_rows the table is that of the T rows themselves."""
    return row if table_rows is None else tl.load(table_rows + (first_row + row) // rows_per_req).to(tl.int64)


# Not specialised on what changes with every prefill: it must not compile anew for that.
@triton.jit(do_not_specialize=["width", "first_row", "rows_per_req", "rows"])
def _scores_kernel(
    q_index,  # [T, Hi, Di]
    index_weights,  # [T, Hi], float32
    index_k,  # [slots, Di]
    page_table,  # [R, W], int32
    table_rows,  # [all rows / rows_per_req], int32 or int64, or None
    lengths,  # [T], int32
    scores,  # [T, >= width], float32: written below each row's length, where that is more than topk
    first_row,  # of the T rows among all
    rows_per_req,
    rows,
    heads,
    dim,
    width,
    topk,
    scores_stride,
    q_stride_t,
    q_stride_h,
    weights_stride,
    k_stride,
    table_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # a block holds all of dim, and keys stay where they are
    DEPENDENT: tl.constexpr,
):
    """One program: the scores of BLOCK_N keys for BLOCK_T rows. Rows in a run of one request share its keys,
    which are loaded once for the run."""
    wait_for_inputs(DEPENDENT)
    begin = tl.program_id(0) * BLOCK_T
    stop = tl.minimum(begin + BLOCK_T, rows)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = begin + tl.arange(0, BLOCK_T)
    block_lengths = tl.minimum(tl.load(lengths + block, mask=block < stop, other=0), width)
    if table_rows is None:
        block_tables = block
    else:
        at = table_rows + (first_row + block) // rows_per_req
        block_tables = tl.load(at, mask=block < stop, other=-1).to(tl.int32)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    q_at = q_index + h[None, :] * q_stride_h + d[:, None]
    while begin < stop:
        table_row = tl.sum(tl.where(block == begin, block_tables, 0), axis=0)
        other = (block > begin) & (block_tables != table_row)
        end = tl.minimum(tl.min(tl.where(other, block, stop), axis=0), stop)
        in_run = (block >= begin) & (block < end)
        longest = tl.max(tl.where(in_run, block_lengths, 0), axis=0)
        if (longest > topk) & (tl.program_id(1) * BLOCK_N < longest):
            live = columns < longest
            page_at = page_table + table_row.to(tl.int64) * table_stride + columns
            slots = tl.load(page_at, mask=live, other=0).to(tl.int64)
            k_at = index_k + slots[:, None] * k_stride + d[None, :]
            if WHOLE:
                k = tl.load(k_at, mask=live[:, None] & (d < dim)[None, :], other=0.0)  # [N, D]
            for t in range(end - begin):
                row = begin.to(tl.int64) + t
                if WHOLE:
                    q_mask = (d < dim)[:, None] & (h < heads)[None, :]
                    q = tl.load(q_at + row * q_stride_t, mask=q_mask, other=0.0)  # [D, H]
                    per_head = tl.dot(k, q, input_precision="ieee")
                else:
                    per_head = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
                    for start in range(0, dim, BLOCK_D):
                        in_d = start + d < dim
                        part = tl.load(k_at + start, mask=live[:, None] & in_d[None, :], other=0.0)
                        q_mask = in_d[:, None] & (h < heads)[None, :]
                        q = tl.load(q_at + row * q_stride_t + start, mask=q_mask, other=0.0)
                        per_head = tl.dot(part, q, per_head, input_precision="ieee")
                w = tl.load(index_weights + row * weights_stride + h, mask=h < heads, other=0.0)  # [H]
                per_head = tl.maximum(per_head, 0.0) * w[None, :]
                length = tl.minimum(tl.load(lengths + row), width)
                score_at = scores + row * scores_stride + columns
                tl.store(score_at, tl.sum(per_head, axis=1), mask=columns < length)
        begin = end


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


def select_topk(
    q_index: torch.Tensor,  # [T, Hi, Di], float32 or bfloat16
    index_weights: torch.Tensor,  # [T, Hi], float32
    index_k_buffer: torch.Tensor,  # [slots, Di], q_index's dtype
    page_table: torch.Tensor,  # [R, W], int32: slot of each position
    table_rows: torch.Tensor | None,  # which row of the page table: as in `metadata.SlotTable`
    lengths: torch.Tensor,  # [T], int32: keys that row t sees, >= 0
    topk: int,
    width: int,  # columns of the page table that can be live, <= W
    *,
    rows_per_req: int | None = None,  # with table_rows [T / rows_per_req]; None: [T]
    padding_slot: int = -1,
) -> torch.Tensor:
    """As `indexer.select_topk`: slots [T, topk], int32, by position, then `padding_slot`."""
    rows, heads, dim = q_index.shape
    for tensor in (q_index, index_weights, index_k_buffer, page_table):
        assert tensor.stride(-1) == 1
    assert q_index.dtype == index_k_buffer.dtype
    slots = torch.empty((rows, topk), dtype=torch.int32, device=q_index.device)
    if rows == 0:
        return slots
    if width == 0:
        return slots.fill_(padding_slot)
    step = max(1, CHUNK_ELEMENTS // width)
    scores = torch.empty((min(rows, step), -(-width // 16) * 16), dtype=torch.float32, device=q_index.device)
    tile = TopkTile.choose(min(rows, step))
    # Rows of a request share a program's keys; where rows are few, more programs count for more.
    shared = table_rows is not None
    block_t = max(1, min(MAX_BLOCK_T, triton.next_power_of_2(rows) // FILLING_ROWS)) if shared else 1
    block_t = max(block_t, triton.next_power_of_2(rows_per_req)) if shared and rows_per_req else block_t
    half = q_index.dtype == torch.bfloat16
    # float32 products are not done by tensor cores: their operands must fit the registers.
    block_n, block_d = (128, max(16, triton.next_power_of_2(dim))) if half else (32, 16)
    for first in range(0, rows, step):
        chunk = slice(first, min(first + step, rows))
        count = chunk.stop - chunk.start
        # Without table_rows a row of the chunk reads the page table's row of the same number.
        table = page_table[chunk] if table_rows is None else page_table
        _scores_kernel[(triton.cdiv(count, block_t), triton.cdiv(width, block_n))](
            q_index[chunk],
            index_weights[chunk],
            index_k_buffer,
            table,
            table_rows,
            lengths[chunk],
            scores,
            first,
            rows_per_req or 1,
            count,
            heads,
            dim,
            width,
            topk,
            scores.stride(0),
            q_index.stride(0),
            q_index.stride(1),
            index_weights.stride(0),
            index_k_buffer.stride(0),
            table.stride(0),
            BLOCK_T=block_t,
            BLOCK_N=block_n,
            BLOCK_H=max(16, triton.next_power_of_2(heads)),
            BLOCK_D=block_d,
            WHOLE=block_d >= dim,
            num_warps=SCORES_WARPS,
            num_stages=3 if half else 1,
            **dependent_launch(slots.device),
        )
        _topk_kernel[(count,)](
            scores,
            table,
            table_rows,
            lengths[chunk],
            slots[chunk],
            first,
            rows_per_req or 1,
            width,
            scores.stride(0),
            table.stride(0),
            topk,
            padding_slot,
            BLOCK=tile.block,
            TILE=tile.keys,
            num_warps=tile.warps,
            **dependent_launch(slots.device),
        )
    return slots
