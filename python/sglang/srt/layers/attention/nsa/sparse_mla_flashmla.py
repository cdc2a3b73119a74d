"""Sparse MLA with DeepSeek's FlashMLA (https://github.com/deepseek-ai/FlashMLA), over the bfloat16 cache."""

from __future__ import annotations

import logging

import torch

from .dims import AttentionDims
from .flashmla_library import HEAD_COUNTS, FlashMLALibrary, load_flashmla

logger = logging.getLogger(__name__)

LATENT, ROPE = 512, 64  # the only dimensions that FlashMLA is compiled for
TOPK_MULTIPLE = 128  # two blocks of 64 slots at a time


def padded_heads(dims: AttentionDims) -> int:
    """The head count that the kernel is called with. Raises ValueError where it cannot serve the model."""
    dims.require("FlashMLA", kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, dtype=torch.bfloat16)
    if dims.index_topk % TOPK_MULTIPLE:
        raise ValueError(f"FlashMLA needs index_topk a multiple of {TOPK_MULTIPLE}, got {dims.index_topk}")
    for count in HEAD_COUNTS:
        if count >= dims.num_attention_heads:
            return count
    raise ValueError(
        f"FlashMLA needs num_attention_heads at most {HEAD_COUNTS[-1]}, got {dims.num_attention_heads}"
    )


class FlashMLASparse:
    """`sparse_mla` over FlashMLA's sparse prefill kernel, for prefill and decode.

    Heads are padded to a count that the kernel is compiled for. Raises ValueError where it cannot serve the
    model and ImportError where FlashMLA is not installed.
    """

    def __init__(self, dims: AttentionDims, library: FlashMLALibrary | None = None) -> None:
        self.heads = padded_heads(dims)
        self.library = library or load_flashmla()
        logger.info("FlashMLA from %s", self.library.source)

    def sparse_mla(
        self,
        q_nope: torch.Tensor,  # [T, H, 512], bfloat16
        q_rope: torch.Tensor,  # [T, H, 64]
        kv_buffer: torch.Tensor,  # [slots, 576]
        topk_slots: torch.Tensor,  # [T, topk], int32: those that count first, then -1
        softmax_scale: float,
    ) -> torch.Tensor:
        """As `sparse_mla.sparse_mla`: mixed latents [T, H, 512]; zeros for a row without any slot."""
        rows, heads, _ = q_nope.shape
        if rows == 0:
            return torch.zeros_like(q_nope)
        out = self.library.sparse_fwd(
            self._padded(q_nope, q_rope), kv_buffer[:, None], topk_slots[:, None], softmax_scale, LATENT
        )[0]
        return out[:, :heads].masked_fill((topk_slots[:, 0] < 0)[:, None, None], 0.0)

    def _padded(self, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
        """[T, padded heads, 576]; the heads beyond the model's are zeros."""
        rows, heads, _ = q_nope.shape
        if heads == self.heads:
            return torch.cat((q_nope, q_rope), dim=-1)
        q = q_nope.new_zeros((rows, self.heads, LATENT + ROPE))
        q[:, :heads, :LATENT] = q_nope
        q[:, :heads, LATENT:] = q_rope
        return q
