"""A linear layer whose weights wait for the loader."""

from __future__ import annotations

import torch
from torch import nn


def linear(
    in_features: int,
    out_features: int,
    bias: bool = False,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> nn.Linear:
    """An uninitialised `nn.Linear`: filling it twice would double the start-up time of a large model."""
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, dtype=dtype, device=device)
