"""The sampler's randomness: Gumbel noise that is a pure function of (seed, position, token id).

It comes from a counter-based integer hash (the idea: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011).
"""

from __future__ import annotations

import torch

MASK32 = 0xFFFFFFFF
# Both below 2**31, so that a product with a 32-bit value fits int64 exactly.
HASH_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
SECOND_KEY = 0x9E3779B9


def gumbel_noise(seed: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise [R, V], float32, for seed [R] and positions [R], int64."""
    uniform = hash_bits(seed, positions, vocab_size).float().add_(0.5).mul_(2.0**-32)
    # -log(-log(1 - u)): floats are densest near u = 0, which is where the largest noise comes from.
    # The clamp: u rounds to 1 at the top, where the noise would be -inf.
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def hash_bits(seed: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """32 random bits of every (seed, position, token): [R, V], int64, the same on every device."""
    low, high = _mix(seed & MASK32), (seed >> 32) & MASK32
    key = _mix(_mix(low ^ high) ^ (positions & MASK32))  # [R]
    second_key = _mix(key ^ SECOND_KEY)
    token = torch.arange(vocab_size, dtype=torch.int64, device=seed.device)
    return _mix(_mix(token ^ key[:, None]) ^ second_key[:, None])


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of the 32-bit integers that spreads every bit (hash-prospector's "21f0aaad" family)."""
    for shift, multiplier in zip((16, 15), HASH_MULTIPLIERS):
        x = ((x ^ (x >> shift)) * multiplier) & MASK32
    return x ^ (x >> 15)
