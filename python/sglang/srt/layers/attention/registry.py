"""The implementations of sparse attention, and the choice among them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparseAttentionOps:
    """The two halves of sparse MLA attention; signatures in `nsa/indexer.py` and `nsa/sparse_mla.py`."""

    name: str
    select_topk: Callable[..., torch.Tensor]
    sparse_mla: Callable[..., torch.Tensor]


def _torch_ops() -> SparseAttentionOps:
    from sglang.srt.layers.attention.nsa.indexer import select_topk
    from sglang.srt.layers.attention.nsa.sparse_mla import sparse_mla

    return SparseAttentionOps("torch", select_topk, sparse_mla)


def _triton_ops() -> SparseAttentionOps:
    from sglang.srt.layers.attention.nsa.indexer_triton import select_topk
    from sglang.srt.layers.attention.nsa.sparse_mla_triton import sparse_mla

    return SparseAttentionOps("triton", select_topk, sparse_mla)


_OPS: dict[str, Callable[[], SparseAttentionOps]] = {"torch": _torch_ops, "triton": _triton_ops}


def select_attention_ops(name: str, device: torch.device, role: str) -> SparseAttentionOps:
    """The implementation of that name; 'auto' is triton on CUDA and torch elsewhere, and is logged.

    Raises ImportError or ValueError where an implementation asked for by name is not available.
    """
    if name == "auto":
        ops = _OPS["triton" if device.type == "cuda" else "torch"]()
        logger.info("sparse attention for %s: %s", role, ops.name)
        return ops
    if name not in _OPS:
        raise ValueError(
            f"sparse attention implementation for {role} must be one of {list(_OPS)}, got {name!r}"
        )
    return _OPS[name]()
