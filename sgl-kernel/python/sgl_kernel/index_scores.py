"""The scores of a lightning indexer: how much each query wants each key of its request."""

from __future__ import annotations

import functools

import torch

from ._library import operator


def index_scores(
    q_index: torch.Tensor,  # [T, Hi, Di], bfloat16
    index_weights: torch.Tensor,  # [T, Hi], float32
    index_k: torch.Tensor,  # [slots, Di], bfloat16
    page_table: torch.Tensor,  # [R, >= width], int32: slot of each position
    table_rows: torch.Tensor | None,  # int32 or int64: rows of the page table; None: row t's is t
    lengths: torch.Tensor,  # [T], int32: keys of each row
    scores: torch.Tensor,  # [T, >= width], float32: written below each row's length, where that is > topk
    *,
    width: int,  # keys of a row beyond it do not count
    topk: int,  # rows with so many keys or fewer need no scores
    first_row: int = 0,  # of the T rows among those of all requests
    rows_per_req: int | None = None,  # table_rows[(first_row + t) // rows_per_req]; None: one a row, in runs
) -> None:
    """scores[t, s] = sum_h index_weights[t, h] * relu(q_index[t, h] . k[s]), in float32, k[s] the key of the
    slot at position s. A product that is NaN counts as 0.

    Serves 32 or 64 heads of 128 (`serves_index_scores`). Heads of q_index, keys and rows of scores begin at
    multiples of 16 bytes. Nothing is written beyond a row's length, and nothing read beyond that of the
    longest row of its request; no length is read by the host: a call can be captured. A score depends on its
    query, its weights and its key alone, to the last bit: not on the batch that they are in.
    """
    operator(index_k.device.type, "index_scores")(
        *(q_index, index_weights, index_k, page_table, table_rows, lengths, scores),
        *(first_row, rows_per_req, width, topk),
    )


@functools.cache
def serves_index_scores(device: torch.device, dtype: torch.dtype, heads: int, dim: int) -> bool:
    """Whether `index_scores` serves such queries there: on CUDA it needs Hopper, and a library built for it.

    RuntimeError where there is no library for the device's type.
    """
    served = operator(device.type, "index_scores_served")
    if device.type == "cuda" and not torch.cuda.is_available():
        return False
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return dtype == torch.bfloat16 and served(index or 0, heads, dim)
