"""The slots of each row's highest scores: what a lightning indexer selects."""

from __future__ import annotations

import torch

from ._library import operator


def topk_slots(
    scores: torch.Tensor,  # [T, >= width], float32; rows begin at multiples of 16 bytes
    page_table: torch.Tensor,  # [R, >= width], int32: slot of each position
    table_rows: torch.Tensor | None,  # [requests], int32 or int64: rows of the page table; None: row t's is t
    lengths: torch.Tensor,  # [T], int32: keys of each row
    slots: torch.Tensor,  # [T, topk], int32: every element is written; topk at most 8192
    *,
    width: int,  # keys of a row beyond it do not count
    first_row: int = 0,  # of the T rows among those of all requests
    rows_per_req: int = 1,  # row t is of request (first_row + t) // rows_per_req
    padding_slot: int = -1,  # stands behind the slots of a row with fewer keys than topk
) -> None:
    """Selects the `topk` highest scores of each row, of equal ones those at the lower positions; a row with
    at most `topk` keys gets them all. Slots come in the order of their positions.

    Scores are ordered as float32 are: -0.0 is equal to 0.0, NaN lies beyond the infinity of its sign. Nothing
    is read beyond a row's length, and no length by the host: a call can be captured. Tables wider than 32,768
    columns take another launch, and memory of torch's allocator for the candidates in between.
    """
    operator(scores.device.type, "topk_slots")(
        scores, page_table, table_rows, lengths, slots, first_row, rows_per_req, width, padding_slot
    )
