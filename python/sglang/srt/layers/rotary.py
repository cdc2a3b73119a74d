"""Rotary position embedding with YaRN, and the two layouts that DeepSeek-V3.2 uses.

Sources: RoFormer (https://arxiv.org/abs/2104.09864), YaRN (https://arxiv.org/abs/2309.00071).
"""

from __future__ import annotations

import math

import torch

from sglang.srt.layers.linear import Layer
from sglang.srt.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Angle per position of each of the dim / 2 pairs, float32."""
    powers = rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if rope.rope_type == "default":
        return 1.0 / powers

    def pair_with_rotations(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times within the original context."""
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(rope.rope_theta))

    low, high = pair_with_rotations(rope.beta_fast), pair_with_rotations(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    # 1: this pair turns often enough to keep its frequency; 0: it is stretched by `factor`.
    keep = 1 - ((pairs - low) / span).clamp(0, 1)
    return (1.0 / (rope.factor * powers)) * (1 - keep) + (1.0 / powers) * keep


class RotaryEmbedding(Layer):
    """The rotations of a batch of positions; computed once per forward pass and shared by the layers."""

    def __init__(self, rope: RopeConfig, dim: int, device: torch.device | str) -> None:
        super().__init__()
        self.scale = rope.cos_sin_scale
        inv_freq = inverse_frequencies(rope, dim).to(device)  # [dim / 2], float32
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """positions [T], int64 -> scale * (cos + i sin) of each pair's angle, [T, 1, dim / 2], complex64."""
        angles = positions[:, None, None].float() * self.inv_freq
        return torch.complex(angles.cos() * self.scale, angles.sin() * self.scale)

    def table(self, length: int) -> torch.Tensor:
        """The rotations of positions 0 .. length - 1: [length, dim / 2], complex64."""
        return self(torch.arange(length, device=self.inv_freq.device)).squeeze(1)


def apply_rotary_interleaved(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x0, x1), (x2, x3), ... of x [T, heads, dim]; computes in float32."""
    return _rotate(x.float().unflatten(-1, (-1, 2)), rotation).to(x.dtype)


def apply_rotary_half(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x_i, x_{i + r/2}) of the first r dims of x [T, heads, dim]; r is the rotation's.

    In the result the members of a pair are neighbours. Queries and keys are reordered alike, so their
    products do not change.
    """
    rope = 2 * rotation.shape[-1]
    rotated = _rotate(x[..., :rope].float().unflatten(-1, (2, -1)).mT, rotation)
    return torch.cat((rotated.to(x.dtype), x[..., rope:]), dim=-1)


def _rotate(pairs: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """pairs [..., r / 2, 2], float32 -> [..., r]"""
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotation).flatten(-2)
