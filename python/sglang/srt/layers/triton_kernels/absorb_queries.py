"""Few rows: W_UK into the queries of attention, and the rotations of `rotate_queries`, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs
from sglang.srt.layers.triton_kernels.rotate_queries import BLOCK_H, rotate_block

MAX_BLOCK_T, BLOCK_C = 64, 128


@triton.jit(do_not_specialize=["rows"])
def _absorb_kernel(
    q,  # [T, H, nope + R]
    w_uk,  # [H, nope, C]
    q_nope,  # [T, H, C]
    q_rope,  # [T, H, R]
    q_index,  # [T, Hi, Di]
    rotation,  # [T, R / 2, 2], float32
    rows,
    heads,
    index_heads,
    nope,
    latent,
    rope,
    q_stride_t,
    q_stride_h,
    weight_stride_h,
    weight_stride_n,
    nope_stride_t,
    nope_stride_h,
    rope_stride_t,
    rope_stride_h,
    index_stride_t,
    index_stride_h,
    rotation_stride,
    ROW_BLOCKS: tl.constexpr,
    LATENT_BLOCKS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    INDEX_BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= nope
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK_C latents of one head for BLOCK_T rows; or one block of one row that is rotated."""
    wait_for_inputs(DEPENDENT)
    program = tl.program_id(0)
    rotated = program - heads * LATENT_BLOCKS * ROW_BLOCKS
    if rotated < 0:
        head = program // (LATENT_BLOCKS * ROW_BLOCKS)
        t = program % ROW_BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)
        c = program // ROW_BLOCKS % LATENT_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        n = tl.arange(0, BLOCK_N)
        w_at = w_uk + head.to(tl.int64) * weight_stride_h + n[:, None] * weight_stride_n + c[None, :]
        w = tl.load(w_at, mask=(n < nope)[:, None] & (c < latent)[None, :], other=0.0)
        q_at = q + t.to(tl.int64)[:, None] * q_stride_t + head * q_stride_h + n[None, :]
        query = tl.load(q_at, mask=(t < rows)[:, None] & (n < nope)[None, :], other=0.0)
        absorbed = tl.dot(query, w, input_precision="ieee")
        out_at = q_nope + t.to(tl.int64)[:, None] * nope_stride_t + head * nope_stride_h + c[None, :]
        inside = (t < rows)[:, None] & (c < latent)[None, :]
        tl.store(out_at, absorbed.to(q_nope.dtype.element_ty), mask=inside)
    else:
        rotate_block(
            q,
            q_rope,
            q_index,
            rotation,
            (rotated // (HEAD_BLOCKS + INDEX_BLOCKS)).to(tl.int64),
            rotated % (HEAD_BLOCKS + INDEX_BLOCKS),
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


def absorb_queries(
    q: torch.Tensor,  # [T, H, nope + R]
    w_uk: torch.Tensor,  # [H, nope, C]
    q_nope: torch.Tensor,  # [T, H, C]: takes q's first dims, multiplied by W_UK
    q_rope: torch.Tensor,  # [T, H, R]: takes q's last R dims, rotated
    q_index: torch.Tensor | None,  # [T, Hi, Di]: rotated in place; None: nothing is selected
    rotation: torch.Tensor,  # [T, 1, R / 2], complex64
) -> None:
    """As `multiply_heads` by W_UK and `rotate_queries`."""
    (rows, heads, _), (_, nope, latent) = q.shape, w_uk.shape
    if not rows:
        return
    angles = torch.view_as_real(rotation)
    other = q if q_index is None else q_index
    for tensor in (q, w_uk, q_nope, q_rope, other):
        assert tensor.stride(2) == 1
    block_c = min(BLOCK_C, max(16, triton.next_power_of_2(latent)))
    block_t = min(MAX_BLOCK_T, max(16, triton.next_power_of_2(rows)))
    row_blocks, latent_blocks = triton.cdiv(rows, block_t), triton.cdiv(latent, block_c)
    head_blocks = triton.cdiv(heads, BLOCK_H)
    index_heads = 0 if q_index is None else q_index.shape[1]
    index_blocks = triton.cdiv(index_heads, BLOCK_H)
    _absorb_kernel[(heads * latent_blocks * row_blocks + rows * (head_blocks + index_blocks),)](
        q,
        w_uk,
        q_nope,
        q_rope,
        other,
        angles,
        rows,
        heads,
        index_heads,
        nope,
        latent,
        2 * rotation.shape[-1],
        q.stride(0),
        q.stride(1),
        w_uk.stride(0),
        w_uk.stride(1),
        q_nope.stride(0),
        q_nope.stride(1),
        q_rope.stride(0),
        q_rope.stride(1),
        other.stride(0),
        other.stride(1),
        angles.stride(0),
        ROW_BLOCKS=row_blocks,
        LATENT_BLOCKS=latent_blocks,
        HEAD_BLOCKS=head_blocks,
        INDEX_BLOCKS=index_blocks,
        BLOCK_T=block_t,
        BLOCK_N=max(16, triton.next_power_of_2(nope)),
        BLOCK_C=block_c,
        BLOCK_H=BLOCK_H,
        BLOCK_P=triton.next_power_of_2(rotation.shape[-1]),
        num_warps=4,
        **dependent_launch(q.device),
    )
