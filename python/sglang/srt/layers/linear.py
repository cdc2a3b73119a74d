"""Modules without hooks, linear layers whose weights wait for the loader, and how weights lie on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS = 16  # of a decode step; one tile of their kernel


class Layer(nn.Module):
    """A module that is called straight. What `nn.Module` does around a call serves hooks, of which there are
    none here, and takes a CPU longer than a small product."""

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


class Linear(Layer, nn.Linear):
    products = ("weight",)  # what `lay_out_for_cpu` may lay out

    def reset_parameters(self) -> None:
        """Left to the loader. (`skip_init` goes by the meta device, which imports sympy.)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]"""
        return multiply(x, self.weight) if self.bias is None else F.linear(x, self.weight, self.bias)


def linear(
    in_features: int,
    out_features: int,
    bias: bool = False,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Linear:
    """An uninitialised `Linear`: filling it twice would double the start-up time of a large model."""
    return Linear(in_features, out_features, bias=bias, dtype=dtype, device=device)


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, in], weight [out, in] -> [T, out]."""
    if not _are_few_rows(x):
        return F.linear(x, weight)
    return _multiply_few_rows(x[:, None], weight[None])[:, 0]


def multiply_heads(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, H, in], weight [H, in, out] -> [T, H, out]: each head by its own matrix.

    On CUDA the product is written where it belongs, row by row; a CPU would do that by a copy.
    """
    if out is None and _are_few_rows(x) and weight.stride(1) == 1:
        return _multiply_few_rows(x, weight.mT)
    if out is None and not x.is_cuda:
        return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
    out = x.new_empty((*x.shape[:2], weight.shape[2])) if out is None else out
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


def _are_few_rows(x: torch.Tensor) -> bool:
    """Whether x holds a decode step's few rows, whose products have a kernel of their own."""
    return x.is_cuda and x.dtype == torch.bfloat16 and len(x) <= FEW_ROWS


def _multiply_few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from sglang.srt.layers.triton_kernels.few_rows import multiply_few_rows

    return multiply_few_rows(x, weight)


def stacked(*linears: Linear) -> torch.Tensor:
    """One matrix [sum of out, in] of linears that multiply the same rows. Their weights become views of it,
    which the loader fills in place."""
    matrix = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, matrix.split([linear.out_features for linear in linears])):
        linear.weight = nn.Parameter(part, requires_grad=False)
        linear.products = ()
    return matrix


def lay_out_for_cpu(model: nn.Module) -> None:
    """Stores the matrices [..., out, in] of `Linear`s and of experts with the outputs side by side: so a CPU
    multiplies a few rows in half the time. Their values and shapes stay."""
    for module in model.modules():
        for name in getattr(module, "products", ()):
            weight = getattr(module, name)
            weight.data = weight.data.mT.contiguous().mT
