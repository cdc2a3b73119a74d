"""A product with a small float32 matrix: few rows, few outputs, no copy of the rows in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs

MAX_ROWS = 64  # more are a matter for a matrix product
MAX_BLOCK_K = 2048


@triton.jit
def row_product(x, weight, size, BLOCK_K: tl.constexpr):
    """The product of two rows, in float32."""
    total = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = tl.load(x + k, mask=k < size, other=0.0).to(tl.float32)
        total += tl.load(weight + k, mask=k < size, other=0.0).to(tl.float32) * value
    return tl.sum(total, axis=0)


@triton.jit
def _small_linear_kernel(
    x,  # [T, K]
    weight,  # [N, K], float32
    out,  # [T, N], float32
    size,
    x_stride,
    scale,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one output of one row, so that there are many to wait for the memory together."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    value = row_product(x + row * x_stride, weight + n * size, size, BLOCK_K)
    tl.store(out + row * tl.num_programs(1) + n, value * scale)


def small_linear(x: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x [T, K], weight [N, K] float32 -> scale * x @ weight.T, [T, N], float32."""
    rows, size = x.shape
    outputs = weight.shape[0]
    if rows > MAX_ROWS or not rows:
        product = F.linear(x.float(), weight)
        return product if scale == 1.0 else product * scale
    assert weight.is_contiguous() and x.stride(1) == 1
    out = torch.empty((rows, outputs), dtype=torch.float32, device=x.device)
    block = min(MAX_BLOCK_K, triton.next_power_of_2(size))
    _small_linear_kernel[(rows, outputs)](
        x, weight, out, size, x.stride(0), scale, BLOCK_K=block, **dependent_launch(x.device)
    )
    return out
