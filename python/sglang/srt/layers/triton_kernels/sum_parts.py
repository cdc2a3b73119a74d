"""Sums of parts in float32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs

BLOCK = 1024


@triton.jit
def _sum_kernel(
    parts,  # [T, K, N], float32
    out,  # [T, N]
    size,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK elements of one row."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (row * PARTS + part) * size + at, mask=at < size, other=0.0)
    tl.store(out + row * size + at, total.to(out.dtype.element_ty), mask=at < size)


def sum_parts(
    parts: torch.Tensor,  # [T, K, N], float32
    dtype: torch.dtype,
) -> torch.Tensor:
    """[T, N] in `dtype`; T is at least 1."""
    rows, count, size = parts.shape
    out = torch.empty((rows, size), dtype=dtype, device=parts.device)
    block = min(BLOCK, triton.next_power_of_2(size))
    _sum_kernel[(rows, triton.cdiv(size, block))](
        parts, out, size, PARTS=count, BLOCK=block, **dependent_launch(parts.device)
    )
    return out
