"""Chooses the next tokens. The randomness is a pure function of (seed, position, token id).

So a request gives the same tokens alone or in a batch, and speculated or not. Gumbel-max: the argmax of
log p + Gumbel noise is distributed like p (https://arxiv.org/abs/1611.01144, section 2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sglang.srt.layers.gumbel_noise import gumbel_noise
from sglang.srt.layers.triton_kernels import runs_triton


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
    from sglang.srt.layers import gumbel_noise_triton

    return gumbel_noise_triton.gumbel_noise


def argmax_function(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """logits [R, V] -> [R], int64: by torch, or where Triton runs by one short kernel."""
    if not runs_triton(device):
        return functools.partial(torch.argmax, dim=-1)
    from sglang.srt.layers.triton_kernels.argmax import argmax

    return argmax
