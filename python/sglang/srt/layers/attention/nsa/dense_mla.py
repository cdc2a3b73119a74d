"""Multi-head latent attention where no row sees more keys than it may select: then it attends to all of them.

What `indexer.select_topk` and `sparse_mla.sparse_mla` give there, without a selection, and with one copy of a
request's keys for all its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .metadata import SlotTable


@dataclass(frozen=True)
class LiveKeys:
    """The keys of a batch with `rows` rows a request: the same in all layers, so made once a pass."""

    slots: torch.Tensor  # [bs * W], int64
    mask: torch.Tensor  # [bs, rows * H, W], float32: 0 where a row sees the key, else the least number

    @classmethod
    def of(cls, table: SlotTable, lengths: torch.Tensor, rows: int, width: int, heads: int) -> LiveKeys:
        """`lengths` [bs * rows], int32: keys that each row sees, at most `width`. Columns of the table at or
        past the longest length of a request are never followed."""
        per_row = lengths.view(-1, rows)  # [bs, rows]
        longest, row = per_row.max(dim=1, keepdim=True)  # [bs, 1]
        requests = table.rows
        if requests is None:  # each row has a page table, of which its own keys count
            requests = torch.arange(0, lengths.shape[0], rows, device=lengths.device) + row[:, 0]
        slots = table.slots[:, :width].index_select(0, requests)  # [bs, W]
        columns = torch.arange(width, device=lengths.device)
        # A dead column reads the request's first key, which is finite, and its weight is exactly zero.
        first = torch.where(longest > 0, slots[:, :1], 0)
        slots = torch.where(columns < longest, slots, first)
        seen = (columns < per_row[..., None])[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        return cls(slots.flatten().long(), mask)


def dense_mla(
    q_nope: torch.Tensor,  # [T, H, C]
    q_rope: torch.Tensor,  # [T, H, R]
    kv_buffer: torch.Tensor,  # [slots, C + R]: latent, then rotated key
    keys: LiveKeys,
    softmax_scale: float,
) -> torch.Tensor:
    """Attends to all keys that a row sees. Returns the mixed latents [T, H, C] in q_nope's dtype.

    Computes in float32. A row that sees no key gives numbers without meaning.
    """
    bs, _, width = keys.mask.shape
    q = torch.cat((q_nope, q_rope), dim=-1).float().view(bs, -1, kv_buffer.shape[1])  # [bs, rows * H, C + R]
    kv = kv_buffer.index_select(0, keys.slots).float().view(bs, width, -1)
    scores = torch.baddbmm(keys.mask, q, kv.mT, alpha=softmax_scale)  # [bs, rows * H, W]
    mixed = torch.bmm(scores.softmax(dim=-1), kv[..., : q_nope.shape[-1]])
    return mixed.view(q_nope.shape).to(q_nope.dtype)
