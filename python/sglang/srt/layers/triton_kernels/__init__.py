"""Triton kernels that do in one launch what the plain layers do in several. Each equals its plain form.

A decode step is hundreds of small kernels, so their number is its time. Triton's interpreter runs them on a
CPU (TRITON_INTERPRET=1), which is how they are tested without a GPU.
"""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(device: torch.device | str) -> bool:
    """Whether layers on the device use these kernels."""
    return INTERPRETED or torch.device(device).type == "cuda"
