"""What SGLang's FlashAttention backend asks of `sgl_kernel.flash_attn`, over the stand-in's attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def _attention() -> ModuleType:
    path = Path(__file__).parents[1] / "minisgl_stand_in/sgl_kernel/flash_attn.py"
    spec = importlib.util.spec_from_file_location("paged_attention_stand_in", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_ATTENTION = _attention()


def flash_attn_with_kvcache(
    q: torch.Tensor,  # [tokens, heads, dim]
    k_cache: torch.Tensor,  # [pages, page_size, kv_heads, dim]
    v_cache: torch.Tensor,
    k: None = None,
    v: None = None,
    qv: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: torch.Tensor | None = None,  # [bs], int32
    cache_batch_idx: None = None,
    cache_leftpad: None = None,
    page_table: torch.Tensor | None = None,  # [bs, pages], int32
    cu_seqlens_q: torch.Tensor | None = None,  # [bs + 1], int32
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int = 1,
    rotary_seqlens: None = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: float = 1.0,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    *unused: Any,
    **also_unused: Any,
) -> torch.Tensor:
    """Causal attention over pages; SGLang passes the arguments in this order."""
    if (k, qv, cache_batch_idx, cache_leftpad) != (None, None, None, None) or tuple(window_size) != (-1, -1):
        raise NotImplementedError("the stand-in has paged causal attention alone")
    return _ATTENTION.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        page_table=page_table,
        cache_seqlens=cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=int(max_seqlen_q),
        softmax_scale=softmax_scale,
        causal=causal,
    )


def flash_attn_varlen_func(*arguments: Any, **named: Any) -> None:
    raise NotImplementedError("the stand-in has paged attention alone")


def get_scheduler_metadata(**named: Any) -> None:
    """FlashAttention 3 then plans within each call."""
    return
