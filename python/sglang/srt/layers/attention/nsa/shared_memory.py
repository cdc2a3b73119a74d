"""How much shared memory a Triton program may use: what its tile must fit."""

from __future__ import annotations

import functools

import torch


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes: 227 KiB on Hopper and data-center Blackwell, 99 to 163 on others; off CUDA there is no limit."""
    if device.type != "cuda":
        return 1 << 40
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
