"""Chooses the next tokens. The randomness is a pure function of (seed, position, token id).

So a request gives the same tokens alone or in a batch, and speculated or not. Gumbel-max: the argmax of
log p + Gumbel noise is distributed like p (https://arxiv.org/abs/1611.01144, section 2). The noise comes from
a counter-based integer hash (the idea: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

MASK32 = 0xFFFFFFFF
# Both below 2**31, so that a product with a 32-bit value fits int64 exactly.
HASH_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
SECOND_KEY = 0x9E3779B9


def sample(
    logits: torch.Tensor,  # [R, V], float32
    positions: torch.Tensor,  # [R], int64: of the tokens being sampled
    temperature: torch.Tensor,  # [R], float32: 0 is greedy
    top_p: torch.Tensor,  # [R], float32
    top_k: torch.Tensor,  # [R], int64: 0 is off
    min_p: torch.Tensor,  # [R], float32
    seed: torch.Tensor,  # [R], int64
    needs_filter: bool = True,
    keep: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Samples one token a row. Returns [R], int64. `keep` is `keep_mask` (the default) or does its work.

    The host may know that no row has top_p, top_k or min_p set; without `needs_filter` the result is then
    the same, with less work.
    """
    cold = temperature <= 0
    # Relative to the maximum, so that a tiny temperature gives -inf, never NaN.
    scores = logits - logits.amax(dim=-1, keepdim=True)
    scores = scores / torch.where(cold, 1.0, temperature)[:, None]
    if needs_filter:
        scores = scores.masked_fill(~(keep or keep_mask)(scores, top_p, top_k, min_p), float("-inf"))
    noise = noise_function(logits.device.type)(seed, positions, logits.shape[1])
    return torch.where(cold, logits.argmax(dim=-1), (scores + noise).argmax(dim=-1))


def keep_mask(
    scores: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Which tokens may be sampled, by SGLang's rules. Returns [R, V], bool.

    All three filters look at the probabilities softmax(scores), not renormalised in between: the top_k most
    likely; of these, those before which less than top_p has accumulated (the one that crosses stays);
    of these, those with at least min_p times the probability of the most likely. Of tokens with equal scores
    the lower id counts as more likely.
    """
    probs, order = scores.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    before = probs.cumsum(dim=-1) - probs  # the mass of the more likely tokens
    keep = (rank < top_k[:, None]) | (top_k <= 0)[:, None]
    # Rounding can lift `before` above 1; a top_p of 1 keeps everything all the same.
    keep &= (before <= top_p[:, None]) | (top_p >= 1)[:, None]
    keep &= probs >= min_p[:, None] * probs[:, :1]
    return torch.zeros_like(keep).scatter_(1, order, keep)


@functools.cache
def noise_function(device_type: str) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """`gumbel_noise`, or on CUDA one Triton kernel that does its work."""
    if device_type != "cuda":
        return gumbel_noise
    from sglang.srt.layers import sampler_triton

    return sampler_triton.gumbel_noise


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
