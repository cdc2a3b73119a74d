"""Rotates the queries of attention, and those of the indexer where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs

BLOCK_H = 8  # heads of a program


@triton.jit
def rotate_block(
    q,  # [T, H, nope + R]: the last R dims of each head are rotated, pairs are neighbours
    q_rope,  # [T, H, R]: where these go
    q_index,  # [T, Hi, Di]: the first R dims, pairs are R / 2 apart and become neighbours
    rotation,  # [T, R / 2, 2], float32
    row,
    block,
    heads,
    index_heads,
    nope,
    rope,
    q_stride_t,
    q_stride_h,
    rope_stride_t,
    rope_stride_h,
    index_stride_t,
    index_stride_h,
    rotation_stride,
    HEAD_BLOCKS: tl.constexpr,  # blocks of a row that are q's; the others are q_index's
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Some heads of one row."""
    pairs = tl.arange(0, BLOCK_P)
    in_pairs = pairs < rope // 2
    angle = rotation + row * rotation_stride + 2 * pairs
    cosine = tl.load(angle, mask=in_pairs, other=0.0)[None, :]
    sine = tl.load(angle + 1, mask=in_pairs, other=0.0)[None, :]
    if block < HEAD_BLOCKS:
        h = block * BLOCK_H + tl.arange(0, BLOCK_H)
        live = (h < heads)[:, None] & in_pairs[None, :]
        at = q + row * q_stride_t + h[:, None] * q_stride_h + nope + 2 * pairs[None, :]
        first = tl.load(at, mask=live, other=0.0).to(tl.float32)
        second = tl.load(at + 1, mask=live, other=0.0).to(tl.float32)
        target = q_rope + row * rope_stride_t + h[:, None] * rope_stride_h + 2 * pairs[None, :]
        tl.store(target, (first * cosine - second * sine).to(q.dtype.element_ty), mask=live)
        tl.store(target + 1, (first * sine + second * cosine).to(q.dtype.element_ty), mask=live)
    else:
        h = (block - HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        live = (h < index_heads)[:, None] & in_pairs[None, :]
        head = q_index + row * index_stride_t + h[:, None] * index_stride_h
        first = tl.load(head + pairs[None, :], mask=live, other=0.0).to(tl.float32)
        second = tl.load(head + rope // 2 + pairs[None, :], mask=live, other=0.0).to(tl.float32)
        tl.debug_barrier()  # all is read before anything is written
        at = head + 2 * pairs[None, :]
        tl.store(at, (first * cosine - second * sine).to(q_index.dtype.element_ty), mask=live)
        tl.store(at + 1, (first * sine + second * cosine).to(q_index.dtype.element_ty), mask=live)


@triton.jit
def _rotate_kernel(
    q,
    q_rope,
    q_index,
    rotation,
    heads,
    index_heads,
    nope,
    rope,
    q_stride_t,
    q_stride_h,
    rope_stride_t,
    rope_stride_h,
    index_stride_t,
    index_stride_h,
    rotation_stride,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one block of one row."""
    wait_for_inputs(DEPENDENT)
    rotate_block(
        q,
        q_rope,
        q_index,
        rotation,
        tl.program_id(0).to(tl.int64),
        tl.program_id(1),
        heads,
        index_heads,
        nope,
        rope,
        q_stride_t,
        q_stride_h,
        rope_stride_t,
        rope_stride_h,
        index_stride_t,
        index_stride_h,
        rotation_stride,
        HEAD_BLOCKS,
        BLOCK_H,
        BLOCK_P,
    )


def rotate_queries(
    q: torch.Tensor,  # [T, H, nope + R]
    q_rope: torch.Tensor,  # [T, H, R]: takes q's last R dims, rotated
    q_index: torch.Tensor | None,  # [T, Hi, Di]: changed in place; None: nothing is selected
    rotation: torch.Tensor,  # [T, 1, R / 2], complex64
) -> None:
    """As `apply_rotary_interleaved` of q's last R dims and `apply_rotary_half` of q_index."""
    rows, heads, width = q.shape
    if not rows:
        return
    angles = torch.view_as_real(rotation)
    rope = 2 * rotation.shape[-1]
    head_blocks = triton.cdiv(heads, BLOCK_H)
    index_heads = 0 if q_index is None else q_index.shape[1]
    other = q if q_index is None else q_index
    assert q.stride(2) == q_rope.stride(2) == other.stride(2) == 1
    _rotate_kernel[(rows, head_blocks + triton.cdiv(index_heads, BLOCK_H))](
        q,
        q_rope,
        other,
        angles,
        heads,
        index_heads,
        width - rope,
        rope,
        q.stride(0),
        q.stride(1),
        q_rope.stride(0),
        q_rope.stride(1),
        other.stride(0),
        other.stride(1),
        angles.stride(0),
        HEAD_BLOCKS=head_blocks,
        BLOCK_H=BLOCK_H,
        BLOCK_P=triton.next_power_of_2(rope // 2),
        num_warps=1,
        **dependent_launch(q.device),
    )
