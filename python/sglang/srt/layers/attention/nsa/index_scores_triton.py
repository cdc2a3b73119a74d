"""The indexer's scores in Triton: of any dtype and shape, for where the kernel library has none."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch_triton import dependent_launch, wait_for_inputs

MAX_BLOCK_T = 32  # rows that a program takes
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


def choose_block_rows(rows: int, shared: bool, rows_per_req: int | None) -> int:
    """Rows of a program, of so many in all; `shared`: those of a request follow each other and share keys."""
    if not shared:
        return 1
    # Where rows are few, more programs count for more.
    block_rows = max(1, min(MAX_BLOCK_T, triton.next_power_of_2(rows) // FILLING_ROWS))
    return max(block_rows, triton.next_power_of_2(rows_per_req or 1))


def index_scores(
    q_index: torch.Tensor,  # [T, Hi, Di], float32 or bfloat16
    index_weights: torch.Tensor,  # [T, Hi], float32
    index_k: torch.Tensor,  # [slots, Di], q_index's dtype
    page_table: torch.Tensor,  # [R, >= width], int32
    table_rows: torch.Tensor | None,  # [all rows / rows_per_req], int32 or int64; None: row t's is t
    lengths: torch.Tensor,  # [T], int32
    scores: torch.Tensor,  # [T, >= width], float32: written below each row's length, where that is > topk
    *,
    width: int,
    topk: int,
    first_row: int = 0,  # of the T rows among all
    rows_per_req: int | None = None,  # None: 1
    block_rows: int,
) -> None:
    """As the kernel library's `index_scores`."""
    rows, heads, dim = q_index.shape
    tile = ScoresTile.choose(q_index, block_rows)
    _scores_kernel[(triton.cdiv(rows, block_rows) * triton.cdiv(width, tile.keys),)](
        q_index,
        index_weights,
        index_k,
        page_table,
        table_rows,
        lengths,
        scores,
        first_row,
        rows_per_req or 1,
        rows,
        heads,
        dim,
        width,
        topk,
        scores.stride(0),
        q_index.stride(0),
        q_index.stride(1),
        index_weights.stride(0),
        index_k.stride(0),
        page_table.stride(0),
        BLOCK_T=block_rows,
        BLOCK_N=tile.keys,
        BLOCK_H=max(16, triton.next_power_of_2(heads)),
        BLOCK_D=tile.dims,
        WHOLE=tile.dims >= dim,
        **tile.options(),
        **dependent_launch(scores.device),
    )
