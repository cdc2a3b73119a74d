"""Residual addition and the RMSNorm of the sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs


@triton.jit
def _add_norm_kernel(
    x,  # [T, size]
    delta,  # [T, size], or None
    weight,  # [size]
    total,  # [T, size]: x + delta, rounded; unused without delta
    normed,  # [T, size]
    size,
    x_stride,
    delta_stride,
    eps,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + row * delta_stride + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * size + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * size + at, (value * scale * w).to(normed.dtype.element_ty), mask=inside)


def add_norm(
    x: torch.Tensor,  # [T, size]
    delta: torch.Tensor | None,  # [T, size], x's dtype; None: nothing is added
    weight: torch.Tensor,  # [size], x's dtype
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + delta), x + delta), each [T, size]; rounds the sum, then normalises in float32."""
    rows, size = x.shape
    normed = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    total = x if delta is None else torch.empty_like(normed)
    if rows:
        block = triton.next_power_of_2(size)
        _add_norm_kernel[(rows,)](
            x,
            delta,
            weight,
            total,
            normed,
            size,
            x.stride(0),
            0 if delta is None else delta.stride(0),
            eps,
            BLOCK=block,
            num_warps=8 if block >= 4096 else 4,
            **dependent_launch(x.device),
        )
    return normed, total
