"""The sampler's Gumbel noise in Triton: one kernel for what takes torch sixty; it stores only the noise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from sglang.srt.layers.gumbel_noise import HASH_MULTIPLIERS, SECOND_KEY
from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs

BLOCK = 1024
FIRST, SECOND = (tl.constexpr(multiplier) for multiplier in HASH_MULTIPLIERS)
SECOND_KEY_MASK = tl.constexpr(SECOND_KEY)


@triton.jit
def _mix(x):  # uint32: the products wrap as `gumbel_noise._mix` masks them
    x = (x ^ (x >> 16)) * FIRST
    x = (x ^ (x >> 15)) * SECOND
    return x ^ (x >> 15)


@triton.jit
def _noise_kernel(
    seed,  # [R], int64
    positions,  # [R], int64
    noise,  # [R, vocab], float32
    vocab,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK tokens of one row."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    row_seed = tl.load(seed + row)
    low, high = row_seed.to(tl.uint32), (row_seed >> 32).to(tl.uint32)
    key = _mix(_mix(_mix(low) ^ high) ^ tl.load(positions + row).to(tl.uint32))
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = _mix(_mix(token.to(tl.uint32) ^ key) ^ _mix(key ^ SECOND_KEY_MASK))
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    value = -tl.log(-libdevice.log1p(-uniform))
    tl.store(noise + row * vocab + token, value, mask=token < vocab)


def gumbel_noise(seed: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """As the plain one, with the same bits and logarithms that may differ in their last digit."""
    rows = seed.shape[0]
    noise = torch.empty((rows, vocab_size), dtype=torch.float32, device=seed.device)
    if rows:
        seed, positions = seed.contiguous(), positions.contiguous()
        _noise_kernel[(rows, triton.cdiv(vocab_size, BLOCK))](
            seed, positions, noise, vocab_size, BLOCK=BLOCK, **dependent_launch(seed.device)
        )
    return noise
