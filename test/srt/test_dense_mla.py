"""Attention to all keys is what a selection of all of them gives, and no dead column is ever followed."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.attention.nsa.dense_mla import LiveKeys, dense_mla
from sglang.srt.layers.attention.nsa.indexer import select_topk
from sglang.srt.layers.attention.nsa.metadata import SlotTable
from sglang.srt.layers.attention.nsa.sparse_mla import sparse_mla

HEADS, LATENT, ROPE, TOPK = 3, 8, 4, 24
POISON = 1 << 30

# Keys that each row of each request sees.
LENGTHS = [
    [[1]],
    [[24], [1], [7]],
    [[5, 6, 7]],
    [[20, 21, 22], [1, 2, 3]],
    [[9, 10, 0], [4, 0, 0], [22, 23, 24]],  # DRAFT_EXTEND: rows that do not count see nothing
    [[0, 0], [3, 4]],  # a padded request
]


@pytest.mark.parametrize("by_request", [False, True], ids=["page-tables", "req_to_token"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_a_selection_of_everything(lengths: list[list[int]], by_request: bool) -> None:
    """Rows of a request have page tables of their own, each live up to its own length only."""
    generator = torch.Generator().manual_seed(1)
    bs, rows = len(lengths), len(lengths[0])
    width = max(max(row) for row in lengths)
    kv = torch.randn((200, LATENT + ROPE), generator=generator)
    kv[0] = float("nan")  # what padding may have left
    index_k = torch.randn((200, 6), generator=generator)
    slots = (torch.randperm(199, generator=generator) + 1).int()[: bs * TOPK].view(bs, TOPK)
    flat = torch.tensor(lengths, dtype=torch.int32).flatten()
    columns = torch.arange(TOPK)
    if by_request:
        longest = torch.tensor([max(row) for row in lengths])
        requests = torch.full((bs + 3, TOPK), POISON, dtype=torch.int32)
        requests[2 : 2 + bs] = torch.where(columns < longest[:, None], slots, POISON)
        table = SlotTable(requests, torch.arange(2, 2 + bs, dtype=torch.int32), rows)
    else:
        own = slots.repeat_interleave(rows, dim=0)
        table = SlotTable(torch.where(columns < flat[:, None], own, POISON))
    q_nope = torch.randn((bs * rows, HEADS, LATENT), generator=generator)
    q_rope = torch.randn((bs * rows, HEADS, ROPE), generator=generator)

    keys = LiveKeys.of(table, flat, rows, width, HEADS)
    found = dense_mla(q_nope, q_rope, kv, keys, 0.3)

    q_index = torch.randn((bs * rows, 2, 6), generator=generator)
    weights = torch.randn((bs * rows, 2), generator=generator)
    selected = select_topk(
        q_index, weights, index_k, table.slots, table.rows, flat, TOPK, width, rows_per_req=table.rows_per_req
    )
    expected = sparse_mla(q_nope, q_rope, kv, selected, 0.3)
    counts = flat > 0
    assert torch.isfinite(expected[counts]).all()
    torch.testing.assert_close(found[counts], expected[counts], rtol=1e-5, atol=1e-6)
