"""Causal attention over a paged KV cache with `flash_attn_with_kvcache`'s arguments, in Triton. Not fast:
it stands in for FlashAttention 3 where what is tested is what is in front of it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _paged_attention(
    q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, out,
    stride_q, stride_head_q, stride_page, stride_slot, stride_head, stride_table, stride_out, stride_head_out,
    scale, page_size,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: one query token of one request, the query heads of one KV head."""
    request, offset, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(cu_seqlens_q + request)
    rows = tl.load(cu_seqlens_q + request + 1) - first
    if offset >= rows:
        return
    visible = tl.load(cache_seqlens + request) - rows + offset + 1
    heads, dims = tl.arange(0, GROUP_PADDED), tl.arange(0, DIM)
    token = (first + offset).to(tl.int64)
    inside = heads[:, None] < GROUP
    at = q + token * stride_q + (kv_head * GROUP + heads[:, None]) * stride_head_q + dims[None, :]
    query = tl.load(at, mask=inside, other=0.0)
    most = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    mixed = tl.zeros([GROUP_PADDED, DIM], tl.float32)
    for start in range(0, visible, KEYS):
        keys = start + tl.arange(0, KEYS)
        live = keys < visible
        page = tl.load(page_table + request * stride_table + keys // page_size, mask=live, other=0)
        slot = page.to(tl.int64) * stride_page + (keys % page_size) * stride_slot + kv_head * stride_head
        key = tl.load(k_cache + slot[:, None] + dims[None, :], mask=live[:, None], other=0.0)
        value = tl.load(v_cache + slot[:, None] + dims[None, :], mask=live[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key)).to(tl.float32) * scale
        scores = tl.where(live[None, :], scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        kept = tl.exp(most - highest)
        weights = tl.exp(scores - highest[:, None])
        total = total * kept + tl.sum(weights, 1)
        mixed = mixed * kept[:, None] + tl.dot(weights.to(value.dtype), value).to(tl.float32)
        most = highest
    result = mixed / total[:, None]
    at = out + token * stride_out + (kv_head * GROUP + heads[:, None]) * stride_head_out + dims[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=inside)


def flash_attn_with_kvcache(
    q: torch.Tensor,  # [tokens, heads, dim]
    k_cache: torch.Tensor,  # [pages, page_size, kv_heads, dim]
    v_cache: torch.Tensor,  # the same
    *,
    page_table: torch.Tensor,  # [bs, >= pages of the longest], int32
    cache_seqlens: torch.Tensor,  # [bs], int32: with the query tokens
    cu_seqlens_q: torch.Tensor,  # [bs + 1], int32
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool = True,
    **unused: Any,
) -> torch.Tensor:  # [tokens, heads, dim]
    """Query token j of n of a request with L keys sees the first L - n + j + 1."""
    assert causal and q.stride(-1) == 1 and k_cache.stride() == v_cache.stride()
    bs, (_, heads, dim), kv_heads = cache_seqlens.shape[0], q.shape, k_cache.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    group = heads // kv_heads
    _paged_attention[bs, max_seqlen_q, kv_heads](
        q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, out,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        page_table.stride(0), out.stride(0), out.stride(1),
        softmax_scale, k_cache.shape[1],
        GROUP=group, GROUP_PADDED=max(16, triton.next_power_of_2(group)), DIM=dim, KEYS=64,
    )  # fmt: skip
    return out
