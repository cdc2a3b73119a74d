"""The lightning indexer of DeepSeek-V3.2: which keys each query attends to.

The score of key s for query t is sum_h w[t, h] * relu(q[t, h] . k[s]); the `topk` highest are selected.
Source: DeepSeek-V3.2-Exp technical report, section 2.1 (equations 1 and 2). This is the torch reference,
which every faster implementation must equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

# Scores [rows, heads, keys] and gathered keys [rows, keys, dim] held at once, in elements (float32): what a
# CPU's caches hold, and a bound for memory.
CHUNK_ELEMENTS = 1 << 21


def select_topk(
    q_index: torch.Tensor,  # [T, Hi, Di], float32 or bfloat16
    index_weights: torch.Tensor,  # [T, Hi], float32
    index_k_buffer: torch.Tensor,  # [slots, Di]: the indexer's keys
    page_table: torch.Tensor,  # [R, W], int32: slot of each position
    table_rows: torch.Tensor | None,  # which row of the page table: as in `metadata.SlotTable`
    lengths: torch.Tensor,  # [T], int32: keys that row t sees, >= 0
    topk: int,
    width: int,  # columns of the page table that can be live, <= W
    *,
    rows_per_req: int | None = None,  # with table_rows [T / rows_per_req]; None: [T], in runs
    padding_slot: int = -1,
) -> torch.Tensor:
    """Selects the keys of each row. Returns slots [T, topk], int32.

    A row with at most `topk` keys gets them all. Slots come in the order of their positions; after them
    stands `padding_slot`: what the reader of the slots takes for none.
    Of keys with equal scores the one at the lower position is preferred. Scores are computed in float32.
    Columns of the page table at or past a row's length are never followed.
    """
    rows = q_index.shape[0]
    slots = torch.full((rows, topk), padding_slot, dtype=torch.int32, device=q_index.device)
    if rows == 0 or width == 0:
        return slots
    own_rows = None  # [T]: of tables that rows do not share in runs
    if rows_per_req is not None:
        own_rows, table_rows = table_rows.repeat_interleave(rows_per_req), None
    for chunk, table_row in _chunks(q_index, index_k_buffer.shape[1], table_rows, width):
        length = lengths[chunk, None]  # [n, 1]
        if table_row is None:
            pages = page_table[:, :width]
            pages = pages[chunk] if own_rows is None else pages.index_select(0, own_rows[chunk])  # [n, width]
            keys = _gather_keys(index_k_buffer, pages, length)  # [n, width, Di]
        else:
            pages = page_table[table_row, :width]  # [width]
            keys = _gather_keys(index_k_buffer, pages, length.max())  # [width, Di]
        scores = _scores(q_index[chunk], index_weights[chunk], keys)
        slots[chunk, : min(topk, width)] = _topk_slots(scores, pages, length, topk, padding_slot)
    return slots


def all_slots(
    page_table: torch.Tensor,  # [R, W], int32: slot of each position
    table_rows: torch.Tensor,  # [T]: which row of the page table
    lengths: torch.Tensor,  # [T], int32: keys that row t sees, at most topk
    topk: int,
    *,
    padding_slot: int = -1,
) -> torch.Tensor:
    """What `select_topk` gives where no row has more than `topk` keys: slots [T, topk], int32."""
    slots = page_table[:, :topk].index_select(0, table_rows)
    live = torch.arange(slots.shape[1], device=slots.device) < lengths[:, None]
    return F.pad(slots.where(live, padding_slot), (0, topk - slots.shape[1]), value=padding_slot)


def _chunks(
    q_index: torch.Tensor, key_dim: int, table_rows: torch.Tensor | None, width: int
) -> Iterator[tuple[slice, int | None]]:
    """Slices of rows that fit the memory bound; rows that share a table row stay together."""
    rows, heads, _ = q_index.shape
    if table_rows is None:
        runs = [(None, rows)]
        per_row = width * (heads + key_dim)
    else:
        values, counts = torch.unique_consecutive(table_rows, return_counts=True)
        runs = list(zip(values.tolist(), counts.tolist()))
        per_row = width * heads
    step = max(1, CHUNK_ELEMENTS // per_row)
    start = 0
    for table_row, count in runs:
        for first in range(start, start + count, step):
            yield slice(first, min(first + step, start + count)), table_row
        start += count


def _gather_keys(index_k_buffer: torch.Tensor, pages: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Keys of the live columns in float32; a dead column's page may be anything, so it reads slot 0."""
    live = torch.arange(pages.shape[-1], device=pages.device) < length
    slots = torch.where(live, pages, 0)
    return index_k_buffer.index_select(0, slots.flatten()).unflatten(0, slots.shape).float()


def _scores(q_index: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q_index [n, Hi, Di], weights [n, Hi], keys [n, L, Di] or [L, Di] -> [n, L], float32."""
    per_head = torch.matmul(q_index.float(), keys.transpose(-1, -2)).relu_()  # [n, Hi, L]
    return torch.bmm(weights[:, None, :], per_head).squeeze(1)


def _topk_slots(
    scores: torch.Tensor, pages: torch.Tensor, length: torch.Tensor, topk: int, padding_slot: int
) -> torch.Tensor:
    """scores [n, L], pages [n, L] or [L], length [n, 1] -> slots [n, min(topk, L)], int32."""
    width = scores.shape[1]
    columns = torch.arange(width, device=scores.device)
    live = columns < length
    picked = topk_by_position(torch.where(live, scores, float("-inf")), min(topk, width))
    picked = torch.where(live.gather(1, picked), picked, width).sort(dim=-1).values
    slots = pages.expand(scores.shape).gather(1, picked.clamp(max=width - 1))
    return torch.where(picked < width, slots, padding_slot)


def topk_by_position(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Columns of the highest scores [n, L], lower columns first among equals. Returns [n, topk], int64.

    torch.topk leaves the order of equal values open. So each score becomes an integer that is ordered like
    it (the usual sign-magnitude trick), and the column goes into the bits below, which makes all distinct.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: -0.0 is equal to 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    width = scores.shape[1]
    keys = (ordered << 32) | torch.arange(width - 1, -1, -1, device=scores.device)
    return keys.topk(topk, dim=-1).indices
