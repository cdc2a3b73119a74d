"""What the NextN layer's projection reads: the norms of a token's embedding and of a hidden state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs


@triton.jit
def _nextn_inputs_kernel(
    tokens,  # [T], int64
    embed,  # [vocab, hidden]
    hidden_states,  # [T, hidden]
    embed_weight,  # [hidden]
    hidden_weight,  # [hidden]
    out,  # [T, 2 * hidden]
    hidden,
    tokens_stride,
    hidden_stride,
    embed_eps,
    hidden_eps,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row's embedding, or its hidden state."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    if tl.program_id(1) == 0:
        token = tl.load(tokens + row * tokens_stride)
        value = tl.load(embed + token * hidden + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(embed_weight + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / hidden + embed_eps)
        target = out + row * 2 * hidden + at
    else:
        value = tl.load(hidden_states + row * hidden_stride + at, mask=inside, other=0.0)
        value = value.to(out.dtype.element_ty).to(tl.float32)
        w = tl.load(hidden_weight + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / hidden + hidden_eps)
        target = out + row * 2 * hidden + hidden + at
    tl.store(target, (value * scale * w).to(out.dtype.element_ty), mask=inside)


def nextn_inputs(
    tokens: torch.Tensor,  # [T], int64
    embed: torch.Tensor,  # [vocab, hidden]
    hidden_states: torch.Tensor,  # [T, hidden], embed's dtype or float32
    embed_norm: tuple[torch.Tensor, float],  # weight [hidden], epsilon
    hidden_norm: tuple[torch.Tensor, float],
) -> torch.Tensor:
    """[T, 2 * hidden], embed's dtype: both norms side by side."""
    rows, hidden = hidden_states.shape
    out = torch.empty((rows, 2 * hidden), dtype=embed.dtype, device=embed.device)
    if rows:
        assert embed.is_contiguous() and hidden_states.stride(1) == 1
        block = triton.next_power_of_2(hidden)
        _nextn_inputs_kernel[(rows, 2)](
            tokens,
            embed,
            hidden_states,
            embed_norm[0],
            hidden_norm[0],
            out,
            hidden,
            tokens.stride(0),
            hidden_states.stride(0),
            embed_norm[1],
            hidden_norm[1],
            BLOCK=block,
            num_warps=8 if block >= 4096 else 4,
            **dependent_launch(embed.device),
        )
    return out
