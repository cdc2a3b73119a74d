"""Sparse MLA in Triton: online softmax over the selected slots, split over them when rows are few.

Equals `sparse_mla.py` up to rounding. The softmax (https://arxiv.org/abs/1805.02867) is in float32; the
splits and their merge follow Flash-Decoding. The grid depends on shapes alone and no length is read by the
host, so the calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch_triton import dependent_launch, wait_for_inputs
from .shared_memory import shared_memory

TARGET_PROGRAMS = 132  # the multiprocessors of an H200: most tiles leave no room for a second program
MIN_SPLIT = 128  # slots; a shorter split costs more to merge than it gains
MAX_SPLITS = 16
SCANNED = 2048  # slots looked at in one go for the last that counts, where a row may be split
LOG2_E = 1.4426950408889634
SHARED_REST = 4096  # bytes: slots, and what reductions exchange


@dataclass(frozen=True)
class Tile:
    """What one program works on, and how."""

    heads: int
    slots: int
    latents: int  # a power of two
    parts: int  # of the latents as values: a program mixes one of them, and scores with all
    warps: int
    stages: int

    @classmethod
    def choose(cls, rows: int, heads: int, latent: int, rope: int, dtype: torch.dtype, shared: int) -> Tile:
        """The fastest, as measured on an H200 (docs/attention_backends.md), that fits `shared` bytes."""
        latents = max(16, triton.next_power_of_2(latent))
        warps = 8 if latents >= 512 else 4
        if dtype != torch.bfloat16:  # not done by tensor cores: the operands must fit the registers
            return cls(16, 16, latents, 1, warps, 1)
        few = cls(16, 32, latents, 1, warps, 1)
        candidates = [cls(16 if heads <= 16 else 32, 32, latents, 1, warps, 2)]
        if latents == 512 and heads > 16:
            candidates.insert(0, cls(64, 64, latents, 1, 8, 2))
            # A warpgroup's product has 64 rows. For two of them to share no row there must be 128 heads,
            # whose sums over all latents do not fit the registers: so two programs take a half each. That
            # is faster for few rows; for many, that the scores are computed twice counts for more.
            if heads > 64 and latents == latent and 2 * rows <= TARGET_PROGRAMS:
                candidates.insert(0, cls(128, 64, latents, 2, 8, 1))
            if rows * triton.cdiv(heads, 16) * MAX_SPLITS <= TARGET_PROGRAMS:  # of one or two rows
                candidates.insert(0, cls(16, 64, latents, 1, 4, 1))
        return next((tile for tile in candidates if tile.shared_bytes(latents + rope) <= shared), few)

    def shared_bytes(self, dim: int) -> int:
        """Of queries and keys, bfloat16."""
        return 2 * (self.heads + self.slots * self.stages) * dim + SHARED_REST


@triton.jit
def _load_columns(at, inside, WHOLE: tl.constexpr):
    """Elements [n, columns]; WHOLE: all columns are inside, and nothing is masked."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=inside[None, :], other=0.0)


# Not specialised on what changes with the number of rows: prefills must not compile anew for that.
@triton.jit(do_not_specialize=["rows", "topk", "splits"])
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
    splits,
    head_blocks,
    nope_stride_t,
    nope_stride_h,
    rope_stride_t,
    rope_stride_h,
    kv_stride,
    slots_stride,
    SPLIT: tl.constexpr,
    SCAN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WHOLE: tl.constexpr,  # the blocks hold all latents and all of rope, no more
    DEPENDENT: tl.constexpr,
):
    """One program: one row, BLOCK_H heads, one split of its slots, one part of the latents as values. The
    splits take blocks of BLOCK_N slots by turns."""
    wait_for_inputs(DEPENDENT)
    per_row = head_blocks * PARTS  # neighbours share the row's keys
    row = (tl.program_id(0) // per_row).to(tl.int64)
    part = tl.program_id(0) % PARTS
    split = tl.program_id(1)
    h = tl.program_id(0) % per_row // PARTS * BLOCK_H + tl.arange(0, BLOCK_H)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    other_c = (1 - part) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    in_h, in_c, in_r = h < heads, c < latent, r < rope
    topk_slots += row * slots_stride

    q_at = q_nope + row * nope_stride_t + h[:, None] * nope_stride_h
    q_c = tl.load(q_at + c[None, :], mask=in_h[:, None] & in_c[None, :], other=0.0)
    if PARTS == 2:
        q_other = tl.load(q_at + other_c[None, :], mask=in_h[:, None], other=0.0)
    q_r_at = q_rope + row * rope_stride_t + h[:, None] * rope_stride_h + r[None, :]
    q_r = tl.load(q_r_at, mask=in_h[:, None] & in_r[None, :], other=0.0)

    # Where the row's last slot is: what follows is not looked at.
    end = 0
    for start in range(0, topk, SCAN):
        candidates = start + tl.arange(0, SCAN)
        used = tl.load(topk_slots + candidates, mask=candidates < topk, other=-1) >= 0
        end = tl.maximum(end, tl.max(tl.where(used, candidates + 1, 0), axis=0))
    last = tl.load(topk_slots + end - 1, mask=end > 0, other=0)

    maximum = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_H, BLOCK_C), dtype=tl.float32)
    step = BLOCK_N * splits if SPLIT else BLOCK_N  # blocks by turns: a short row, too, is work for several
    n = split * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = tl.load(topk_slots + n, mask=n < end, other=-1)
    for _ in range(split * BLOCK_N, end, step):
        live = slots >= 0
        # Where there is none another of the row is read: its keys are finite, their weight is exactly zero.
        kv_at = kv + tl.where(live, slots, last).to(tl.int64)[:, None] * kv_stride
        k_c = _load_columns(kv_at + c[None, :], in_c, WHOLE)
        if PARTS == 2:
            k_other = tl.load(kv_at + other_c[None, :])
        k_r = _load_columns(kv_at + latent + r[None, :], in_r, WHOLE)
        n += step
        slots = tl.load(topk_slots + n, mask=n < end, other=-1)  # so the next keys do not wait for them
        scores = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
        if PARTS == 2:
            scores = tl.dot(q_other, tl.trans(k_other), scores, input_precision="ieee")
        scores = tl.dot(q_r, tl.trans(k_r), scores, input_precision="ieee")
        scores = tl.where(live[None, :], scores * scale_log2, float("-inf"))  # [H, N]
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # A block may hold no slot at all: exp2(-inf - -inf) must not become NaN.
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        decay = tl.exp2(maximum - base)
        p = tl.exp2(scores - base[:, None])
        total = total * decay + tl.sum(p, axis=1)
        mixed = tl.dot(p.to(k_c.dtype), k_c, mixed * decay[:, None], input_precision="ieee")
        maximum = new_maximum

    empty = total == 0.0
    mixed = mixed / tl.where(empty, 1.0, total)[:, None]
    head = (split * rows + row) * heads + h
    if SPLIT:
        log_sum = tl.where(empty, float("-inf"), maximum + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(log_sums + head, log_sum, mask=in_h)
    stored = in_h[:, None] & in_c[None, :]
    if SPLIT:  # nobody reads what weighs nothing
        stored = stored & (total > 0.0)[:, None]
    out_at = out + head[:, None] * latent + c[None, :]
    tl.store(out_at, mixed.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    parts,  # [splits, T * H, C], float32
    log_sums,  # [splits, T * H], float32
    out,  # [T * H, C]
    latent,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one head of one row; weighs each split by its share of the softmax's sum."""
    wait_for_inputs(DEPENDENT)
    head = tl.program_id(0).to(tl.int64)
    heads = tl.num_programs(0)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    log_sum = tl.load(log_sums + s * heads + head, mask=s < splits, other=float("-inf"))
    maximum = tl.max(log_sum, axis=0)
    share = tl.exp2(log_sum - tl.where(maximum == float("-inf"), 0.0, maximum))
    total = tl.sum(share, axis=0)
    part_at = parts + (s[:, None] * heads + head) * latent + c[None, :]
    part = tl.load(part_at, mask=(share > 0.0)[:, None] & (c < latent)[None, :], other=0.0)
    mixed = tl.sum(part * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * latent + c, mixed.to(out.dtype.element_ty), mask=c < latent)


def choose_splits(rows: int, head_blocks: int, topk: int) -> int:
    """Parts to divide each row's slots into, so that few rows still fill the device, once."""
    return max(1, min(MAX_SPLITS, topk // MIN_SPLIT, TARGET_PROGRAMS // (rows * head_blocks)))


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
    block_r = max(16, triton.next_power_of_2(q_rope.shape[-1]))
    tile = Tile.choose(rows, heads, latent, block_r, q_nope.dtype, shared_memory(out.device))
    head_blocks = triton.cdiv(heads, tile.heads)
    splits = choose_splits(rows, head_blocks * tile.parts, topk)
    parts, log_sums = out, out
    if splits > 1:
        parts = torch.empty((splits, rows, heads, latent), dtype=torch.float32, device=out.device)
        log_sums = torch.empty((splits, rows, heads), dtype=torch.float32, device=out.device)
    _sparse_mla_kernel[(rows * head_blocks * tile.parts, splits)](
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
        splits,
        head_blocks,
        q_nope.stride(0),
        q_nope.stride(1),
        q_rope.stride(0),
        q_rope.stride(1),
        kv_buffer.stride(0),
        topk_slots.stride(0),
        SPLIT=splits > 1,
        SCAN=SCANNED if topk >= 2 * MIN_SPLIT else 2 * MIN_SPLIT,
        PARTS=tile.parts,
        BLOCK_H=tile.heads,
        BLOCK_N=tile.slots,
        BLOCK_C=tile.latents // tile.parts,
        BLOCK_R=block_r,
        WHOLE=tile.latents == latent and block_r == q_rope.shape[-1],
        num_warps=tile.warps,
        num_stages=tile.stages,
        **dependent_launch(out.device),
    )
    if splits > 1:
        _merge_kernel[(rows * heads,)](
            parts,
            log_sums,
            out,
            latent,
            splits,
            BLOCK_S=MAX_SPLITS,
            BLOCK_C=tile.latents,
            num_warps=4,
            **dependent_launch(out.device),
        )
    return out


@triton.jit
def _zero_dead_rows_kernel(
    out,
    topk_slots,
    size,
    heads,
    stride_t,
    stride_h,
    slots_stride,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    if tl.load(topk_slots + row * slots_stride) < 0:
        at = tl.arange(0, BLOCK)
        for head in range(heads):
            tl.store(out + row * stride_t + head * stride_h + at, 0.0, mask=at < size)


def zero_dead_rows(out: torch.Tensor, topk_slots: torch.Tensor) -> None:
    """Writes zeros into the rows of `out` [T, H, C] whose slots [T, topk] begin with none."""
    rows, heads, size = out.shape
    assert out.stride(2) == 1
    if rows:
        _zero_dead_rows_kernel[(rows,)](
            out,
            topk_slots,
            size,
            heads,
            out.stride(0),
            out.stride(1),
            topk_slots.stride(0),
            BLOCK=triton.next_power_of_2(size),
            num_warps=1,
            **dependent_launch(out.device),
        )
