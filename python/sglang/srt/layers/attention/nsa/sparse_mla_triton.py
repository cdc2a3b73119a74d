"""Sparse MLA in Triton: online softmax over the selected slots, split over them when rows are few.

Equals `sparse_mla.py` up to rounding. The softmax (https://arxiv.org/abs/1805.02867) is in float32; the
splits and their merge follow Flash-Decoding. The grid depends on shapes alone and no length is read by the
host, so the calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TARGET_PROGRAMS = 264  # two for each of an H200's 132 multiprocessors
MIN_SPLIT = 128  # slots; a shorter split costs more to merge than it gains
MAX_SPLITS = 16
LOG2_E = 1.4426950408889634


# Not specialised on what changes with the number of rows: prefills must not compile anew for that.
@triton.jit(do_not_specialize=["rows", "split_size"])
def _sparse_mla_kernel(
    q_nope,  # [T, H, C]
    q_rope,  # [T, H, R]
    kv,  # [slots, C + R]
    topk_slots,  # [T, topk], int32
    out,  # [T, H, C]: the result when there is one split, else [splits, T, H, C] float32
    log_sums,  # [splits, T, H], float32: log2 of each split's sum; unused when there is one split
    scale_log2,
    rows,
    heads,
    latent,
    rope,
    topk,
    split_size,
    nope_stride_t,
    nope_stride_h,
    rope_stride_t,
    rope_stride_h,
    kv_stride,
    slots_stride,
    SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr,  # >= topk
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: one row, BLOCK_H heads, one split of the row's slots."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    in_h, in_c, in_r = h < heads, c < latent, r < rope
    topk_slots += row * slots_stride

    # Where the split's last slot is: what follows is not looked at.
    begin = split * split_size
    stop = tl.minimum(begin + split_size, topk)
    candidates = tl.arange(0, BLOCK_S)
    in_split = (candidates >= begin) & (candidates < stop)
    used = tl.load(topk_slots + candidates, mask=in_split, other=-1) >= 0
    end = tl.max(tl.where(used, candidates + 1, begin), axis=0)

    q_c_at = q_nope + row * nope_stride_t + h[:, None] * nope_stride_h + c[None, :]
    q_c = tl.load(q_c_at, mask=in_h[:, None] & in_c[None, :], other=0.0)
    q_r_at = q_rope + row * rope_stride_t + h[:, None] * rope_stride_h + r[None, :]
    q_r = tl.load(q_r_at, mask=in_h[:, None] & in_r[None, :], other=0.0)

    maximum = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_H, BLOCK_C), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        slots = tl.load(topk_slots + n, mask=n < end, other=-1).to(tl.int64)
        live = slots >= 0
        kv_at = kv + slots[:, None] * kv_stride
        k_c = tl.load(kv_at + c[None, :], mask=live[:, None] & in_c[None, :], other=0.0)
        k_r = tl.load(kv_at + latent + r[None, :], mask=live[:, None] & in_r[None, :], other=0.0)
        scores = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
        scores += tl.dot(q_r, tl.trans(k_r), input_precision="ieee")
        scores = tl.where(live[None, :], scores * scale_log2, float("-inf"))  # [H, N]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # A block may hold no slot at all: exp2(-inf - -inf) must not become NaN.
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        decay = tl.exp2(maximum - base)
        p = tl.exp2(scores - base[:, None])
        total = total * decay + tl.sum(p, axis=1)
        mixed = mixed * decay[:, None] + tl.dot(p.to(k_c.dtype), k_c, input_precision="ieee")
        maximum = new_maximum

    empty = total == 0.0
    mixed = mixed / tl.where(empty, 1.0, total)[:, None]
    head = (split * rows + row) * heads + h
    if SPLIT:
        log_sum = tl.where(empty, float("-inf"), maximum + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(log_sums + head, log_sum, mask=in_h)
    out_at = out + head[:, None] * latent + c[None, :]
    tl.store(out_at, mixed.to(out.dtype.element_ty), mask=in_h[:, None] & in_c[None, :])


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    parts,  # [splits, T * H, C], float32
    log_sums,  # [splits, T * H], float32
    out,  # [T * H, C]
    latent,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: one head of one row; weighs each split by its share of the softmax's sum."""
    head = tl.program_id(0).to(tl.int64)
    heads = tl.num_programs(0)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    log_sum = tl.load(log_sums + s * heads + head, mask=s < splits, other=float("-inf"))
    maximum = tl.max(log_sum, axis=0)
    share = tl.exp2(log_sum - tl.where(maximum == float("-inf"), 0.0, maximum))
    total = tl.sum(share, axis=0)
    part_at = parts + (s[:, None] * heads + head) * latent + c[None, :]
    part = tl.load(part_at, mask=(s < splits)[:, None] & (c < latent)[None, :], other=0.0)
    mixed = tl.sum(part * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * latent + c, mixed.to(out.dtype.element_ty), mask=c < latent)


def choose_splits(rows: int, head_blocks: int, topk: int) -> int:
    """Parts to divide each row's slots into, so that few rows still fill the device; a power of two."""
    splits = 1
    while (
        splits < MAX_SPLITS
        and rows * head_blocks * splits * 2 <= TARGET_PROGRAMS
        and topk >= splits * 2 * MIN_SPLIT
    ):
        splits *= 2
    return splits


def sparse_mla(
    q_nope: torch.Tensor,  # [T, H, C], float32 or bfloat16
    q_rope: torch.Tensor,  # [T, H, R]
    kv_buffer: torch.Tensor,  # [slots, C + R]: latent, then rotated key; q_nope's dtype
    topk_slots: torch.Tensor,  # [T, topk], int32: -1 where there is none, anywhere in the row
    softmax_scale: float,
) -> torch.Tensor:
    """As `sparse_mla.sparse_mla`: mixed latents [T, H, C]; zeros for a row without any slot."""
    rows, heads, latent = q_nope.shape
    topk = topk_slots.shape[1]
    for tensor in (q_nope, q_rope, kv_buffer, topk_slots):
        assert tensor.stride(-1) == 1
    assert q_nope.dtype == q_rope.dtype == kv_buffer.dtype
    out = torch.empty((rows, heads, latent), dtype=q_nope.dtype, device=q_nope.device)
    if rows == 0 or topk == 0:
        return out.zero_()
    # float32 products are not done by tensor cores: their operands must fit the registers.
    half = q_nope.dtype == torch.bfloat16
    block_h = 32 if half and heads > 16 else 16
    block_c = max(16, triton.next_power_of_2(latent))
    head_blocks = triton.cdiv(heads, block_h)
    splits = choose_splits(rows, head_blocks, topk)
    split_size = triton.cdiv(topk, splits)
    parts, log_sums = out, out
    if splits > 1:
        parts = torch.empty((splits, rows, heads, latent), dtype=torch.float32, device=out.device)
        log_sums = torch.empty((splits, rows, heads), dtype=torch.float32, device=out.device)
    _sparse_mla_kernel[(rows, head_blocks, splits)](
        q_nope,
        q_rope,
        kv_buffer,
        topk_slots,
        parts,
        log_sums,
        softmax_scale * LOG2_E,
        rows,
        heads,
        latent,
        q_rope.shape[-1],
        topk,
        split_size,
        q_nope.stride(0),
        q_nope.stride(1),
        q_rope.stride(0),
        q_rope.stride(1),
        kv_buffer.stride(0),
        topk_slots.stride(0),
        SPLIT=splits > 1,
        BLOCK_S=triton.next_power_of_2(topk),
        BLOCK_H=block_h,
        BLOCK_N=32 if half else 16,
        BLOCK_C=block_c,
        BLOCK_R=max(16, triton.next_power_of_2(q_rope.shape[-1])),
        num_warps=8 if block_c >= 512 else 4,
        num_stages=2 if half else 1,
    )
    if splits > 1:
        _merge_kernel[(rows * heads,)](
            parts, log_sums, out, latent, splits, BLOCK_S=MAX_SPLITS, BLOCK_C=block_c, num_warps=4
        )
    return out
