"""A product with a small float32 matrix: few rows, few outputs, no copy of the rows in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

MAX_ROWS = 64  # more are a matter for a matrix product
BLOCK_N = 4


@triton.jit
def _small_linear_kernel(
    x,  # [T, K]
    weight,  # [N, K], float32
    out,  # [T, N], float32
    outputs,
    size,
    x_stride,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_N outputs of one row."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = tl.load(x + row * x_stride + k, mask=k < size, other=0.0).to(tl.float32)
        live = (n < outputs)[:, None] & (k < size)[None, :]
        total += tl.load(weight + n[:, None] * size + k[None, :], mask=live, other=0.0) * value[None, :]
    tl.store(out + row * outputs + n, tl.sum(total, axis=1) * scale, mask=n < outputs)


def small_linear(x: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x [T, K], weight [N, K] float32 -> scale * x @ weight.T, [T, N], float32."""
    rows, size = x.shape
    outputs = weight.shape[0]
    if rows > MAX_ROWS or not rows:
        product = F.linear(x.float(), weight)
        return product if scale == 1.0 else product * scale
    assert weight.is_contiguous() and x.stride(1) == 1
    out = torch.empty((rows, outputs), dtype=torch.float32, device=x.device)
    _small_linear_kernel[(rows, triton.cdiv(outputs, BLOCK_N))](
        x,
        weight,
        out,
        outputs,
        size,
        x.stride(0),
        scale,
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(1024, triton.next_power_of_2(size)),
        num_warps=4,
    )
    return out
