"""silu(gate) * up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs

BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(gate_up, out, size, gate_up_stride, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """One program: BLOCK elements of one row. The gate is rounded before it multiplies, as in torch."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * gate_up_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + size + at, mask=inside, other=0.0).to(tl.float32)
    opened = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + at, (opened * up).to(out.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 * I] -> [..., I]"""
    size = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * size)
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    if rows.numel():
        block = min(BLOCK, triton.next_power_of_2(size))
        grid = (rows.shape[0], triton.cdiv(size, block))
        _silu_and_mul_kernel[grid](
            rows, out, size, rows.stride(0), BLOCK=block, num_warps=4, **dependent_launch(gate_up.device)
        )
    return out
