"""Multi-head latent attention over selected keys, in latent space (the "absorbed" form).

Source: DeepSeek-V2 (https://arxiv.org/abs/2405.04434), section 2.1: with W_UK absorbed into the query, the
cached latent is key and value of every head at once. This is the torch reference.
"""

from __future__ import annotations

import torch

# Gathered keys [rows, topk, C + R] and scores [rows, H, topk] held at once, in elements (float32): what a
# CPU's caches hold, and a bound for memory.
CHUNK_ELEMENTS = 1 << 21


def sparse_mla(
    q_nope: torch.Tensor,  # [T, H, C]
    q_rope: torch.Tensor,  # [T, H, R]
    kv_buffer: torch.Tensor,  # [slots, C + R]: latent, then rotated key
    topk_slots: torch.Tensor,  # [T, topk], int32: -1 where there is none, anywhere in the row
    softmax_scale: float,
) -> torch.Tensor:
    """Attends to the given slots. Returns the mixed latents [T, H, C] in q_nope's dtype.

    Computes in float32. A row without any slot gives zeros.
    """
    rows, heads, latent = q_nope.shape
    topk_slots = _drop_dead_columns(topk_slots)
    width = topk_slots.shape[1]
    out = torch.zeros_like(q_nope)
    if rows == 0 or width == 0:
        return out
    step = max(1, CHUNK_ELEMENTS // (width * (kv_buffer.shape[1] + heads)))
    for first in range(0, rows, step):
        chunk = slice(first, min(first + step, rows))
        q = torch.cat((q_nope[chunk], q_rope[chunk]), dim=-1).float()  # [n, H, C + R]
        slots = topk_slots[chunk]  # [n, width]
        dead = slots < 0
        # A dead column reads a live slot of its row, which is finite, and its weight is exactly zero.
        slots = torch.where(dead, slots.amax(dim=1, keepdim=True).clamp(min=0), slots)
        kv = kv_buffer.index_select(0, slots.flatten()).unflatten(0, slots.shape).float()  # [n, width, C + R]
        scores = torch.bmm(q, kv.transpose(1, 2)).mul_(softmax_scale)  # [n, H, width]
        scores.masked_fill_(dead[:, None], torch.finfo(torch.float32).min)
        mixed = torch.bmm(scores.softmax(dim=-1), kv[..., :latent])
        out[chunk] = mixed.masked_fill_(dead.all(dim=1)[:, None, None], 0.0).to(q_nope.dtype)
    return out


def _drop_dead_columns(topk_slots: torch.Tensor) -> torch.Tensor:
    """On the CPU, where a look costs nothing: leaves out the columns at the end that no row uses."""
    if topk_slots.device.type != "cpu":
        return topk_slots
    used = (topk_slots >= 0).any(dim=0).nonzero()
    return topk_slots[:, : int(used.max()) + 1 if used.numel() else 0]
