"""A layer's latents: the norms of the query's and the key's, the rotation of the key, both caches; and, of
few rows, the weights of the indexer's heads, which are made of the same rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs
from sglang.srt.layers.triton_kernels.small_linear import MAX_BLOCK_K, row_product

KEY_PARTS = tl.constexpr(3)  # programs of a row beside those of the indexer's heads


@triton.jit
def _store_rms_norm(source, target, weight, size, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    tl.store(target + at, (value * scale * w).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _store_pairs(target, first, second, angle, pairs, inside):
    """Rotates pairs (first, second) by `angle` and stores them side by side."""
    cosine = tl.load(angle + 2 * pairs, mask=inside, other=0.0)
    sine = tl.load(angle + 2 * pairs + 1, mask=inside, other=0.0)
    dtype = target.dtype.element_ty
    tl.store(target + 2 * pairs, (first * cosine - second * sine).to(dtype), mask=inside)
    tl.store(target + 2 * pairs + 1, (first * sine + second * cosine).to(dtype), mask=inside)


@triton.jit
def _store_rotated_key(source, target, angle, rope, BLOCK: tl.constexpr):
    """Pairs are neighbours."""
    pairs = tl.arange(0, BLOCK)
    inside = pairs < rope // 2
    first = tl.load(source + 2 * pairs, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + 2 * pairs + 1, mask=inside, other=0.0).to(tl.float32)
    _store_pairs(target, first, second, angle, pairs, inside)


@triton.jit
def _layer_normed(source, weight, bias, at, inside, mean, scale, target):
    """Rounded as it would be stored in `target`, in float32."""
    value = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return ((value - mean) * scale * w + b).to(target.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_index_key(
    source, target, weight, bias, angle, size, rope, eps, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    """LayerNorm, then a rotation of pairs that are rope / 2 apart and become neighbours."""
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=0) / size
    centred = tl.where(inside, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / size + eps)
    normed = _layer_normed(source, weight, bias, at, inside, mean, scale, target)
    tl.store(target + at, normed.to(target.dtype.element_ty), mask=inside & (at >= rope))
    pairs = tl.arange(0, BLOCK_P)
    live = pairs < rope // 2
    first = _layer_normed(source, weight, bias, pairs, live, mean, scale, target)
    second = _layer_normed(source, weight, bias, pairs + rope // 2, live, mean, scale, target)
    _store_pairs(target, first, second, angle, pairs, live)


@triton.jit
def _latents_kernel(
    projected,  # [T, Q + C + R + D]: query's latent, key's latent, key to rotate, indexer's key
    rotation,  # [T, R / 2, 2], float32: cosine and sine of each pair's angle
    slots,  # [T], int64: of the caches
    q_weight,  # [Q]
    kv_weight,  # [C]
    k_weight,  # [D]
    k_bias,  # [D]
    q_latent,  # [T, Q]
    kv,  # [slots or T, C + R]
    index_k,  # [slots, D]
    x,  # [T, hidden]
    index_matrix,  # [Hi, hidden], float32
    index_weights,  # [T, Hi], float32: the last three unused without programs for them
    index_scale,
    hidden,
    q_size,
    latent,
    rope,
    index_dim,
    x_stride,
    projected_stride,
    rotation_stride,
    slots_stride,
    kv_stride,
    index_stride,
    q_eps,
    kv_eps,
    k_eps,
    KV_BY_SLOT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pairs
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row's query latent, or its key, or its indexer's key, or the weight of one head."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    projected += row * projected_stride
    angle = rotation + row * rotation_stride
    slot = tl.load(slots + row * slots_stride)
    if part == 0:
        _store_rms_norm(projected, q_latent + row * q_size, q_weight, q_size, q_eps, BLOCK_Q)
    elif part == 1:
        key = projected + q_size
        kv_row = kv + (slot if KV_BY_SLOT else row) * kv_stride
        _store_rms_norm(key, kv_row, kv_weight, latent, kv_eps, BLOCK_C)
        _store_rotated_key(key + latent, kv_row + latent, angle, rope, BLOCK_P)
    elif part >= KEY_PARTS:
        head = part - KEY_PARTS
        weight = row_product(x + row * x_stride, index_matrix + head * hidden, hidden, BLOCK_K)
        tl.store(index_weights + row * (tl.num_programs(1) - KEY_PARTS) + head, weight * index_scale)
    else:
        index_key = projected + q_size + latent + rope
        index_row = index_k + slot * index_stride
        _store_index_key(
            index_key, index_row, k_weight, k_bias, angle, index_dim, rope, k_eps, BLOCK_D, BLOCK_P
        )


def write_latents(
    projected: torch.Tensor,  # [T, Q + C + R + D]
    rotation: torch.Tensor,  # [T, 1, R / 2], complex64
    slots: torch.Tensor,  # [T], int64
    q_norm: tuple[torch.Tensor, float],  # weight [Q], epsilon
    kv_norm: tuple[torch.Tensor, float],  # weight [C], epsilon
    k_norm: tuple[torch.Tensor, torch.Tensor, float],  # weight [D], bias [D], epsilon
    kv: torch.Tensor,  # [slots, C + R], or [T, C + R] where a cache of another format takes the rows
    index_k: torch.Tensor,  # [slots, D]
    by_slot: bool,  # whether kv is the cache
    index_product: tuple[torch.Tensor, torch.Tensor, float] | None = None,  # x, matrix, scale
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Writes the keys of T rows; returns the query's normed latents [T, Q], and with `index_product`, of x
    [T, hidden] and matrix [Hi, hidden] float32, scale * x @ matrix.T: [T, Hi], float32."""
    rows = projected.shape[0]
    q_size, latent, index_dim = q_norm[0].shape[0], kv_norm[0].shape[0], k_norm[0].shape[0]
    rope = 2 * rotation.shape[-1]
    assert projected.shape[1] == q_size + latent + rope + index_dim and projected.stride(1) == 1
    q_latent = torch.empty((rows, q_size), dtype=projected.dtype, device=projected.device)
    x, matrix, scale = index_product or (projected, projected[:0], 1.0)
    assert matrix.is_contiguous() and x.stride(1) == 1
    index_weights = torch.empty((rows, len(matrix)), dtype=torch.float32, device=projected.device)
    if rows:
        angles = torch.view_as_real(rotation)  # [T, 1, R / 2, 2]
        _latents_kernel[(rows, KEY_PARTS.value + len(matrix))](
            projected,
            angles,
            slots,
            q_norm[0],
            kv_norm[0],
            k_norm[0],
            k_norm[1],
            q_latent,
            kv,
            index_k,
            x,
            matrix,
            index_weights,
            scale,
            x.shape[1],
            q_size,
            latent,
            rope,
            index_dim,
            x.stride(0),
            projected.stride(0),
            angles.stride(0),
            slots.stride(0),
            kv.stride(0),
            index_k.stride(0),
            q_norm[1],
            kv_norm[1],
            k_norm[2],
            KV_BY_SLOT=by_slot,
            BLOCK_Q=triton.next_power_of_2(q_size),
            BLOCK_C=triton.next_power_of_2(latent),
            BLOCK_P=triton.next_power_of_2(rope // 2),
            BLOCK_D=triton.next_power_of_2(index_dim),
            BLOCK_K=min(MAX_BLOCK_K, triton.next_power_of_2(x.shape[1])),
            num_warps=4,
            **dependent_launch(projected.device),
        )
    return q_latent, index_weights if index_product else None
