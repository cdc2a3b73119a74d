"""Products of few rows with matrices. Reading the matrices is all that they cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs
from sglang.srt.layers.triton_kernels.sum_parts import sum_parts

BLOCK_T = 16  # rows; more are a matter for a library's product
TARGET_PROGRAMS = 128  # about one for each multiprocessor of a large card
MIN_SPLIT = 2048  # inputs; a shorter part of a sum costs more to add than it gains


@dataclass(frozen=True)
class Blocks:
    """A program's tile of the matrix, how it is read, and among how many programs a sum is split."""

    outputs: int
    inputs: int
    stages: int
    splits: int

    @classmethod
    def choose(cls, heads: int, outputs: int, inputs: int, dtype: torch.dtype) -> Blocks:
        """The fastest as measured on an H200, of 1 to 5 rows."""
        if dtype == torch.float32:  # not done by tensor cores: operands must fit the registers
            return cls(16, 32, 1, 1)
        wide, narrow = (cls._split(heads, outputs, inputs, *tile) for tile in ((64, 128), (32, 256)))
        return wide if wide.programs(heads, outputs) >= TARGET_PROGRAMS else narrow

    @classmethod
    def _split(cls, heads: int, outputs: int, inputs: int, tile_outputs: int, tile_inputs: int) -> Blocks:
        blocks = cls(tile_outputs, tile_inputs, 4, 1)
        while blocks.programs(heads, outputs) < TARGET_PROGRAMS and inputs >= 2 * blocks.splits * MIN_SPLIT:
            blocks = replace(blocks, splits=2 * blocks.splits)
        return blocks

    def programs(self, heads: int, outputs: int) -> int:
        return heads * triton.cdiv(outputs, self.outputs) * self.splits


@triton.jit(do_not_specialize=["rows"])
def _few_rows_kernel(
    x,  # [T, H, K]
    weight,  # [H, N, K]
    out,  # [T, splits, H, N]: float32 where there are several splits
    rows,
    heads,
    outputs,
    size,
    split_size,
    x_stride_t,
    x_stride_h,
    weight_stride_h,
    weight_stride_n,
    WHOLE: tl.constexpr,  # blocks divide every split
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK_N outputs of one head for all rows, from one split of the inputs."""
    wait_for_inputs(DEPENDENT)
    head, split = tl.program_id(1), tl.program_id(2)
    t = tl.arange(0, BLOCK_T)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_t, in_n = t < rows, n < outputs
    x_at = x + head * x_stride_h + t[None, :] * x_stride_t
    weight_at = weight + head.to(tl.int64) * weight_stride_h + n.to(tl.int64)[:, None] * weight_stride_n
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    begin = split * split_size
    for start in range(begin, tl.minimum(begin + split_size, size), BLOCK_K):
        at = start + k
        if WHOLE:
            weight_mask, x_mask = in_n[:, None], in_t[None, :]
        else:
            weight_mask, x_mask = in_n[:, None] & (at < size)[None, :], in_t[None, :] & (at < size)[:, None]
        matrix = tl.load(weight_at + at[None, :], mask=weight_mask, other=0.0)
        value = tl.load(x_at + at[:, None], mask=x_mask, other=0.0)
        total = tl.dot(matrix, value, total, input_precision="ieee")
    out_at = out + ((t * tl.num_programs(2) + split) * heads + head)[None, :] * outputs + n[:, None]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=in_n[:, None] & in_t[None, :])


def multiply_few_rows(
    x: torch.Tensor,  # [T, H, K], float32 or bfloat16; T is at most BLOCK_T
    weight: torch.Tensor,  # [H, N, K], x's dtype
) -> torch.Tensor:
    """Each head by its own matrix: [T, H, N]."""
    (rows, heads, size), outputs = x.shape, weight.shape[1]
    assert x.stride(2) == 1 and weight.stride(2) == 1 and rows <= BLOCK_T
    if not rows:
        return x.new_empty((0, heads, outputs))
    blocks = Blocks.choose(heads, outputs, size, x.dtype)
    dtype = torch.float32 if blocks.splits > 1 else x.dtype
    out = torch.empty((rows, blocks.splits, heads, outputs), dtype=dtype, device=x.device)
    split_size = triton.cdiv(size, blocks.splits * blocks.inputs) * blocks.inputs
    _few_rows_kernel[(triton.cdiv(outputs, blocks.outputs), heads, blocks.splits)](
        x,
        weight,
        out,
        rows,
        heads,
        outputs,
        size,
        split_size,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        weight.stride(1),
        WHOLE=size % blocks.inputs == 0,
        BLOCK_T=BLOCK_T,
        BLOCK_N=blocks.outputs,
        BLOCK_K=blocks.inputs,
        num_warps=4,
        num_stages=blocks.stages,
        **dependent_launch(x.device),
    )
    if blocks.splits > 1:
        return sum_parts(out.flatten(2), x.dtype).view(rows, heads, outputs)
    return out[:, 0]
