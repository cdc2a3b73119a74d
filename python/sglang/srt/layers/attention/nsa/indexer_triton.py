"""The lightning indexer in Triton: scores over the paged keys, then an exact top-k. Equals `indexer.py`.

The top-k is Triton's or, where it is installed, the kernel library's. The grids depend on shapes alone and
programs past a row's length end at once, so the calls can be captured in a CUDA graph and cost what the live
lengths cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import topk_triton
from .launch_triton import dependent_launch, wait_for_inputs

# Scores [rows, width] held at once, in elements (float32): only long prefills need more than one chunk.
CHUNK_ELEMENTS = 1 << 26
MAX_BLOCK_T = 32  # rows that a program of the scores takes
FILLING_ROWS = 16  # fewer blocks of rows than that leave multiprocessors idle at short widths


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
    # Programs that run together share rows: the L2 holds a prefill's keys, but not its queries.
    key_blocks = (width + BLOCK_N - 1) // BLOCK_N
    first_key = tl.program_id(0) % key_blocks * BLOCK_N
    begin = tl.program_id(0) // key_blocks * BLOCK_T
    stop = tl.minimum(begin + BLOCK_T, rows)
    columns = first_key + tl.arange(0, BLOCK_N)
    block = begin + tl.arange(0, BLOCK_T)
    block_lengths = tl.minimum(tl.load(lengths + block, mask=block < stop, other=0), width)
    if table_rows is None:
        block_tables = block
    else:
        at = table_rows + (first_row + block) // rows_per_req
        block_tables = tl.load(at, mask=block < stop, other=-1).to(tl.int32)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    q_offsets = (h * q_stride_h)[None, :] + d[:, None]  # 32 bits are enough within a row
    while begin < stop:
        table_row = tl.sum(tl.where(block == begin, block_tables, 0), axis=0)
        other = (block > begin) & (block_tables != table_row)
        end = tl.minimum(tl.min(tl.where(other, block, stop), axis=0), stop)
        in_run = (block >= begin) & (block < end)
        longest = tl.max(tl.where(in_run, block_lengths, 0), axis=0)
        if (longest > topk) & (first_key < longest):
            live = columns < longest
            page_at = page_table + table_row.to(tl.int64) * table_stride + columns
            slots = tl.load(page_at, mask=live, other=0).to(tl.int64)
            k_at = index_k + slots[:, None] * k_stride + d[None, :]
            if WHOLE:
                k = tl.load(k_at, mask=live[:, None] & (d < dim)[None, :], other=0.0)  # [N, D]
            for t in range(end - begin):
                row = begin.to(tl.int64) + t
                q_at = q_index + row * q_stride_t + q_offsets
                if WHOLE:
                    q_mask = (d < dim)[:, None] & (h < heads)[None, :]
                    q = tl.load(q_at, mask=q_mask, other=0.0)  # [D, H]
                    per_head = tl.dot(k, q, input_precision="ieee")
                else:
                    per_head = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
                    for start in range(0, dim, BLOCK_D):
                        in_d = start + d < dim
                        part = tl.load(k_at + start, mask=live[:, None] & in_d[None, :], other=0.0)
                        q_mask = in_d[:, None] & (h < heads)[None, :]
                        q = tl.load(q_at + start, mask=q_mask, other=0.0)
                        per_head = tl.dot(part, q, per_head, input_precision="ieee")
                w = tl.load(index_weights + row * weights_stride + h, mask=h < heads, other=0.0)  # [H]
                per_head = tl.maximum(per_head, 0.0) * w[None, :]
                length = tl.minimum(tl.load(lengths + row), width)
                score_at = scores + row * scores_stride + columns
                tl.store(score_at, tl.sum(per_head, axis=1), mask=columns < length)
        begin = end


@dataclass(frozen=True)
class ScoresTile:
    """What a program of the scores works on at a time, beside its rows."""

    keys: int
    dims: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, where it should take fewer than the compiler would

    @classmethod
    def choose(cls, q_index: torch.Tensor, rows: int) -> ScoresTile:
        """`rows` are those of a program. Measured on an H200: docs/results/2026-11-21-h200-prefill."""
        _, heads, dim = q_index.shape
        if q_index.dtype != torch.bfloat16:
            # float32 products are not done by tensor cores: their operands must fit the registers.
            return cls(32, 16, 4, 1)
        dims = max(16, triton.next_power_of_2(dim))
        if rows == MAX_BLOCK_T and heads <= 64 and dim <= 128 and _is_hopper(q_index.device):
            return cls(256, dims, 8, 2, registers=128)  # two programs fit a multiprocessor
        return cls(128, dims, 4, 3)

    def options(self) -> dict[str, int]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


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
    topk_slots: Callable[..., None] = topk_triton.topk_slots,
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
    step = max(1, CHUNK_ELEMENTS // width // 4 * 4)  # lengths [step:] are aligned: Triton compiles for either
    scores = torch.empty((min(rows, step), -(-width // 16) * 16), dtype=torch.float32, device=q_index.device)
    # Rows of a request share a program's keys; where rows are few, more programs count for more.
    shared = table_rows is not None
    block_t = max(1, min(MAX_BLOCK_T, triton.next_power_of_2(rows) // FILLING_ROWS)) if shared else 1
    block_t = max(block_t, triton.next_power_of_2(rows_per_req)) if shared and rows_per_req else block_t
    tile = ScoresTile.choose(q_index, block_t)
    for first in range(0, rows, step):
        chunk = slice(first, min(first + step, rows))
        count = chunk.stop - chunk.start
        # Without table_rows a row of the chunk reads the page table's row of the same number.
        table = page_table[chunk] if table_rows is None else page_table
        _scores_kernel[(triton.cdiv(count, block_t) * triton.cdiv(width, tile.keys),)](
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
            BLOCK_N=tile.keys,
            BLOCK_H=max(16, triton.next_power_of_2(heads)),
            BLOCK_D=tile.dims,
            WHOLE=tile.dims >= dim,
            **tile.options(),
            **dependent_launch(slots.device),
        )
        topk_slots(
            *(scores[:count], table, table_rows, lengths[chunk], slots[chunk]),
            width=width,
            first_row=first,
            rows_per_req=rows_per_req or 1,
            padding_slot=padding_slot,
        )
    return slots
