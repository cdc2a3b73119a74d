"""Root-mean-square norm (https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.layers.linear import Layer
from sglang.srt.layers.triton_kernels import runs_triton
from sglang.srt.libraries.flashinfer import load_flashinfer

logger = logging.getLogger(__name__)

_ROW_ALIGNMENT = 8  # elements: FlashInfer loads 16 bytes at a time
Kernel = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # (x, weight, eps) -> norm


class RMSNorm(Layer):
    """Normalises and scales in float32 and rounds once: by torch, or in bfloat16 on CUDA by FlashInfer."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps
        self.register_buffer("sqrt_eps", torch.tensor(eps**0.5, device=device), persistent=False)
        self.float_on_cpu = torch.device(device).type == "cpu" and dtype == torch.float32
        half_on_cuda = torch.device(device).type == "cuda" and dtype == torch.bfloat16
        self.kernel = flashinfer_rmsnorm() if half_on_cuda else None
        self.fused = runs_triton(device)

    def add(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + delta), x + delta), each [T, size]; without delta x is the sum."""
        if self.fused:
            from sglang.srt.layers.triton_kernels.add_norm import add_norm

            return add_norm(x, delta, self.weight, self.eps)
        total = x if delta is None else x + delta
        return self(total), total

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype."""
        if self.kernel is not None and x.numel():
            return self.kernel(x, self.weight, self.eps)
        if self.float_on_cpu:  # a third of the operations: sqrt(mean square + eps) is a hypotenuse
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return x.div(norm.mul_(x.shape[-1] ** -0.5).hypot_(self.sqrt_eps)).mul_(self.weight)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@functools.cache
def flashinfer_rmsnorm() -> Kernel | None:
    """FlashInfer's RMSNorm for bfloat16 on CUDA; None where it is not installed or does not run (logged)."""
    try:
        norm = load_flashinfer("norm")
        one = torch.ones((1, 64), dtype=torch.bfloat16, device="cuda")
        norm.rmsnorm(one, one[0], 1e-6)  # compiles it where the package brings no binary
        torch.cuda.synchronize()
    except Exception as error:  # by CUTLASS's DSL or by nvcc, each of which fails in ways of its own
        level = logging.INFO if isinstance(error, ImportError) else logging.WARNING
        logger.log(level, "RMSNorm by torch, not by flashinfer: %s", error)
        return None

    def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(0) % _ROW_ALIGNMENT or rows.data_ptr() % 16:
            rows = rows.contiguous()
        return norm.rmsnorm(rows, weight, eps).view(x.shape)

    logger.info("RMSNorm by flashinfer")
    return rmsnorm
