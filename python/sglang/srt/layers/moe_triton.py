"""Routed experts in Triton: (token, expert) pairs grouped by expert, then two grouped matrix products.

Five launches for any number of tokens, four for one. Their grids depend on shapes alone and nothing is read
by the host, so they can be captured in a CUDA graph. An expert that nobody chose costs nothing, and no matrix
is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs
from sglang.srt.layers.triton_kernels.sum_parts import sum_parts

FEW_ROWS = 16  # of an expert: one block
FEW_PAIRS, MANY_PAIRS = 128, 1024  # that the grouping looks at in one go
NONE = -1


@dataclass(frozen=True)
class Blocks:
    """Sizes of a program's tile; rows are those of one expert."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    @classmethod
    def choose(cls, pairs: int, experts: int, dtype: torch.dtype) -> Blocks:
        """For as many rows as an expert has on average; all fit the 99 KiB of shared memory of any card."""
        if dtype == torch.float32:  # not done by tensor cores: operands must fit the registers
            return cls(16, 32, 16, 4, 1)
        per_expert = pairs / experts
        if per_expert <= FEW_ROWS:
            return cls(FEW_ROWS, 32, 128, 4, 4)
        if per_expert <= 256:
            return cls(64, 64, 64, 4, 4)
        return cls(128, 128, 64, 8, 2)


@triton.jit(do_not_specialize=["pairs", "max_blocks"], do_not_specialize_on_alignment=["cursors"])
def _group_kernel(
    pair_experts,  # [P], int64 or int32
    order,  # [max_blocks * BLOCK_M], int32: pairs by expert, each expert's filled up with NONE
    block_experts,  # [max_blocks], int32: whose rows a block of `order` holds, NONE beyond the last
    cursors,  # [E], int32: scratch
    pairs,
    experts,
    max_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program in all. Pairs of one expert come in any order: each is computed on its own."""
    wait_for_inputs(DEPENDENT)
    e = tl.arange(0, BLOCK_E)
    lane = tl.arange(0, TILE)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, pairs, TILE):
        chosen = tl.load(pair_experts + start + lane, mask=start + lane < pairs, other=0).to(tl.int32)
        counts += tl.histogram(chosen, BLOCK_E, mask=start + lane < pairs)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(blocks, axis=0)
    tl.store(cursors + e, (ends - blocks) * BLOCK_M, mask=e < experts)
    for start in range(0, max_blocks, 32):
        block = start + tl.arange(0, 32)
        owner = tl.sum((ends[None, :] <= block[:, None]).to(tl.int32), axis=1)
        tl.store(block_experts + block, tl.where(owner < BLOCK_E, owner, -1), mask=block < max_blocks)
    for start in range(0, max_blocks * BLOCK_M, TILE):
        tl.store(order + start + lane, -1, mask=start + lane < max_blocks * BLOCK_M)
    tl.debug_barrier()  # what other threads stored is read, and written over, from here on
    for start in range(0, pairs, TILE):
        live = start + lane < pairs
        chosen = tl.load(pair_experts + start + lane, mask=live, other=0)
        at = tl.atomic_add(cursors + chosen, 1, mask=live)
        tl.store(order + at, start + lane, mask=live)


@triton.jit
def _block_pairs(order, block, BLOCK_M: tl.constexpr):
    """The pairs of a block, [BLOCK_M], NONE where there is none; without `order` each block has one pair."""
    at = tl.arange(0, BLOCK_M)
    if order is None:
        pairs = tl.where(at == 0, block, -1)
    else:
        pairs = tl.load(order + block * BLOCK_M + at)
    return pairs


@triton.jit
def _gate_up_kernel(
    x,  # [T, hidden]
    gate_up,  # [E, 2 * I, hidden]
    inner,  # [P, I]: silu(gate) * up of each pair
    order,
    block_experts,
    top_k,
    hidden,
    intermediate,
    x_stride,
    expert_stride,
    output_stride,
    input_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK_M pairs of one expert, BLOCK_N columns of gate and the same of up."""
    wait_for_inputs(DEPENDENT)
    expert = tl.load(block_experts + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        pair = _block_pairs(order, tl.program_id(0), BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        live, in_n = pair >= 0, n < intermediate
        x_at = x + (pair // top_k).to(tl.int64)[:, None] * x_stride + k[None, :]
        gate_at = gate_up + expert * expert_stride + n[None, :] * output_stride + k[:, None] * input_stride
        up_at = gate_at + intermediate * output_stride
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, hidden, BLOCK_K):
            in_k = start + k < hidden
            rows = tl.load(x_at + start, mask=live[:, None] & in_k[None, :], other=0.0)
            mask = in_k[:, None] & in_n[None, :]
            w_gate = tl.load(gate_at + start * input_stride, mask=mask, other=0.0)
            w_up = tl.load(up_at + start * input_stride, mask=mask, other=0.0)
            gate = tl.dot(rows, w_gate, gate, input_precision="ieee")
            up = tl.dot(rows, w_up, up, input_precision="ieee")
        # As the products' own dtype rounds them, which is what separate operators would see.
        gate = gate.to(x.dtype.element_ty).to(tl.float32)
        up = up.to(x.dtype.element_ty).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(x.dtype.element_ty).to(tl.float32)
        inner_at = inner + pair.to(tl.int64)[:, None] * intermediate + n[None, :]
        tl.store(inner_at, (silu * up).to(x.dtype.element_ty), mask=live[:, None] & in_n[None, :])


@triton.jit
def _down_kernel(
    inner,  # [P, I]
    down,  # [E, hidden, I]
    weights,  # [P], float32
    out,  # [P, hidden], float32: weighed
    order,
    block_experts,
    hidden,
    intermediate,
    expert_stride,
    output_stride,
    input_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK_M pairs of one expert, BLOCK_N of their outputs."""
    wait_for_inputs(DEPENDENT)
    expert = tl.load(block_experts + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        pair = _block_pairs(order, tl.program_id(0), BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        live, in_n = pair >= 0, n < hidden
        inner_at = inner + pair.to(tl.int64)[:, None] * intermediate + k[None, :]
        down_at = down + expert * expert_stride + n[None, :] * output_stride + k[:, None] * input_stride
        y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, intermediate, BLOCK_K):
            in_k = start + k < intermediate
            rows = tl.load(inner_at + start, mask=live[:, None] & in_k[None, :], other=0.0)
            w_at = down_at + start * input_stride
            w = tl.load(w_at, mask=in_k[:, None] & in_n[None, :], other=0.0)
            y = tl.dot(rows, w, y, input_precision="ieee")
        y = y.to(inner.dtype.element_ty).to(tl.float32)
        y *= tl.load(weights + pair, mask=live, other=0.0)[:, None]
        out_at = out + pair.to(tl.int64)[:, None] * hidden + n[None, :]
        tl.store(out_at, y, mask=live[:, None] & in_n[None, :])


def group_by_expert(
    experts: torch.Tensor,  # [T, K], int64
    count: int,  # E
    block_rows: int,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`order` and `block_experts` of the grouped products. One row's experts differ: each has one pair."""
    pairs = experts.numel()
    if experts.shape[0] == 1:
        return None, experts
    # Every expert may leave a block partly filled.
    max_blocks = min(pairs, triton.cdiv(pairs, block_rows) + count)
    ints = torch.empty(max_blocks * (block_rows + 1) + count, dtype=torch.int32, device=experts.device)
    order, block_experts, cursors = ints.split((max_blocks * block_rows, max_blocks, count))
    # If possible where the products' tiles change, too: fewer kinds of passes then need a compiler.
    few = pairs <= (FEW_ROWS * count if FEW_ROWS * count <= MANY_PAIRS else FEW_PAIRS)
    _group_kernel[(1,)](
        experts,
        order,
        block_experts,
        cursors,
        pairs,
        count,
        max_blocks,
        BLOCK_M=block_rows,
        BLOCK_E=max(2, triton.next_power_of_2(count)),
        TILE=FEW_PAIRS if few else MANY_PAIRS,
        num_warps=4 if few else 8,
        **dependent_launch(experts.device),
    )
    return order, block_experts


def routed_experts(
    x: torch.Tensor,  # [T, hidden], float32 or bfloat16
    weights: torch.Tensor,  # [T, K], float32
    experts: torch.Tensor,  # [T, K], int64
    gate_up: torch.Tensor,  # [E, 2 * I, hidden], x's dtype
    down: torch.Tensor,  # [E, hidden, I]
) -> torch.Tensor:
    """The weighted sum of each row's experts, [T, hidden] in x's dtype; as `moe.RoutedExperts` defines it."""
    (rows, top_k), (count, _, hidden), intermediate = experts.shape, gate_up.shape, down.shape[2]
    pairs = rows * top_k
    if pairs == 0:
        return torch.zeros_like(x)
    assert x.stride(1) == 1 and experts.is_contiguous() and weights.is_contiguous()
    blocks = Blocks.choose(pairs, count, x.dtype)
    order, block_experts = group_by_expert(experts, count, blocks.rows)
    max_blocks = block_experts.numel()
    options = {"BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns, "BLOCK_K": blocks.inner}
    options |= {"num_warps": blocks.warps, "num_stages": blocks.stages, **dependent_launch(x.device)}
    inner = torch.empty((pairs, intermediate), dtype=x.dtype, device=x.device)
    _gate_up_kernel[(max_blocks, triton.cdiv(intermediate, blocks.columns))](
        x,
        gate_up,
        inner,
        order,
        block_experts,
        top_k,
        hidden,
        intermediate,
        x.stride(0),
        *gate_up.stride(),
        **options,
    )
    parts = torch.empty((rows, top_k, hidden), dtype=torch.float32, device=x.device)
    _down_kernel[(max_blocks, triton.cdiv(hidden, blocks.columns))](
        inner,
        down,
        weights,
        parts,
        order,
        block_experts,
        hidden,
        intermediate,
        *down.stride(),
        **options,
    )
    return sum_parts(parts, x.dtype)
