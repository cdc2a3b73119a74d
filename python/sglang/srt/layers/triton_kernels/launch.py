"""How kernels are launched. The code is the portable core's, which has to stand alone."""

from __future__ import annotations

from sglang.srt.layers.attention.nsa.launch_triton import dependent_launch, wait_for_inputs

__all__ = ["dependent_launch", "wait_for_inputs"]
