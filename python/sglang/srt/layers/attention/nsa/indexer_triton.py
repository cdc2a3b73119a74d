"""The lightning indexer on a GPU: scores over the paged keys, then an exact top-k. Equals `indexer.py`.

Both halves are the kernel library's where it is installed and serves the queries, else Triton's. The grids
depend on shapes alone and programs past a row's length end at once, so the calls can be captured in a CUDA
graph and cost what the live lengths cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch

from . import index_scores_triton, topk_triton

# Scores [rows, width] held at once, in elements (float32): only long prefills need more than one chunk.
CHUNK_ELEMENTS = 1 << 26


def _index_scores(
    library: ModuleType | None, q_index: torch.Tensor, shared: bool, rows_per_req: int | None
) -> Callable[..., None]:
    """The library's, where it serves such queries, else Triton's."""
    rows, heads, dim = q_index.shape
    if library is not None and library.serves_index_scores(q_index.device, q_index.dtype, heads, dim):
        return library.index_scores
    block_rows = index_scores_triton.choose_block_rows(rows, shared, rows_per_req)
    return functools.partial(index_scores_triton.index_scores, block_rows=block_rows)


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
    library: ModuleType | None = None,  # the kernel library: its top-k, and its scores where it serves
) -> torch.Tensor:
    """As `indexer.select_topk`: slots [T, topk], int32, by position, then `padding_slot`."""
    rows = q_index.shape[0]
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
    index_scores = _index_scores(library, q_index, table_rows is not None, rows_per_req)
    topk_slots = topk_triton.topk_slots if library is None else library.topk_slots
    for first in range(0, rows, step):
        chunk = slice(first, min(first + step, rows))
        chunk_scores = scores[: chunk.stop - first]
        # Without table_rows a row of the chunk reads the page table's row of the same number.
        table = page_table[chunk] if table_rows is None else page_table
        index_scores(
            *(q_index[chunk], index_weights[chunk], index_k_buffer),
            *(table, table_rows, lengths[chunk], chunk_scores),
            width=width,
            topk=topk,
            first_row=first,
            rows_per_req=rows_per_req,
        )
        topk_slots(
            *(chunk_scores, table, table_rows, lengths[chunk], slots[chunk]),
            width=width,
            first_row=first,
            rows_per_req=rows_per_req or 1,
            padding_slot=padding_slot,
        )
    return slots
