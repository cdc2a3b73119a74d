"""The greedy choice: the column of each row's maximum, from logits of any dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs

BLOCK = 8192


@triton.jit
def _argmax_kernel(logits, out, size, stride, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """One program: one row. Every lane keeps the best of its own columns; the lowest of equals wins."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    column = lane
    for start in range(0, size, BLOCK):
        at = start + lane
        value = tl.load(logits + row * stride + at, mask=at < size, other=float("-inf")).to(tl.float32)
        better = value > best
        best = tl.where(better, value, best)
        column = tl.where(better, at, column)
    top = tl.max(best, axis=0)
    tl.store(out + row, tl.min(tl.where(best == top, column, size - 1), axis=0).to(tl.int64))


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] -> [R], int64; of equal values the first. Rows hold no NaN."""
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    assert logits.stride(1) == 1
    if rows:
        block = min(BLOCK, triton.next_power_of_2(size))
        _argmax_kernel[(rows,)](
            logits, out, size, logits.stride(0), BLOCK=block, num_warps=16, **dependent_launch(logits.device)
        )
    return out
