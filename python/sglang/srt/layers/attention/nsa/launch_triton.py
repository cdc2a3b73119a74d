"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits inside for it.

So its start hides behind the other's end, in a stream and in a captured graph. A kernel that is launched
with these options begins with `wait_for_inputs`; one that is not (a library's) starts, as always, when all
before it have ended.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    """Waits until all kernels before have ended and what they wrote is seen; then lets the next one start.

    Every program passes it before it writes anything or reads what a kernel has written: so that a kernel has
    ended tells the next one that those before it have, too.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Options of a launch: dependent where the device can (Hopper and later)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
