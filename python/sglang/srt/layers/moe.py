"""Mixture of experts: DeepSeek-V3's sigmoid router and its routed and shared experts.

Source: DeepSeek-V3 (https://arxiv.org/abs/2412.19437), sections 2.1.2 (gating, bias-corrected choice) and
2.1.4 (node-limited, here group-limited, routing).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.layers.linear import Layer, linear
from sglang.srt.layers.triton_kernels import runs_triton
from sglang.srt.model_config import ModelConfig

MASKED_CPU_ROWS = 16  # that the all-experts path takes; bounds its [E, rows, 2 * I] intermediate
JOINED_ROWS = 64  # up to which the shared expert is one of the routed; more are a matter for a matrix product


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 * I] -> [..., I]"""
    if runs_triton(gate_up.device):
        from sglang.srt.layers.triton_kernels.silu_and_mul import silu_and_mul

        return silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class GatedMLP(Layer):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix."""

    def __init__(
        self, hidden: int, intermediate: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.gate_up_proj = linear(hidden, 2 * intermediate, dtype=dtype, device=device)
        self.down_proj = linear(intermediate, hidden, dtype=dtype, device=device)

    def place(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Puts the weights where they lie among others, which the loader fills in place."""
        for layer, matrix in ((self.gate_up_proj, gate_up), (self.down_proj, down)):
            layer.weight = nn.Parameter(matrix, requires_grad=False)
            layer.products = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))


class RoutingRule(NamedTuple):
    """How many experts a token visits, and from where."""

    groups: int
    top_groups: int
    topk: int
    normalise: bool
    scaling: float

    @classmethod
    def of(cls, config: ModelConfig) -> RoutingRule:
        return cls(
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )


class TopkRouter(Layer):
    """Chooses experts by sigmoid score plus bias, within the best groups; weighs them by the score alone."""

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        super().__init__()
        self.rule = RoutingRule.of(config)
        experts = config.n_routed_experts
        weight = torch.empty((experts, config.hidden_size), dtype=torch.float32, device=device)
        bias = torch.empty(experts, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        self.fused = runs_triton(device)

    def forward(self, x: torch.Tensor, shared: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] -> weights [T, K] float32, experts [T, K] int64. Triton's kernel appends `shared`
        experts, with weight 1."""
        if self.fused:
            from sglang.srt.layers.triton_kernels.route import route
            from sglang.srt.layers.triton_kernels.small_linear import small_linear

            logits = small_linear(x, self.weight)
            return route(logits, self.e_score_correction_bias, self.rule, shared)
        return choose_experts(F.linear(x.float(), self.weight), self.e_score_correction_bias, self.rule)


def choose_experts(
    logits: torch.Tensor,  # [T, E], float32
    bias: torch.Tensor,  # [E], float32
    rule: RoutingRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weights [T, K] float32 and experts [T, K] int64, in any order."""
    scores = logits.sigmoid()
    choice = (scores + bias).unflatten(-1, (rule.groups, -1))  # [T, G, E / G]
    if rule.top_groups < rule.groups:
        group_scores = choice.topk(2, dim=-1).values.sum(-1)  # [T, G]
        best = group_scores.topk(rule.top_groups, dim=-1, sorted=False).indices
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        choice = choice.masked_fill(closed[..., None], float("-inf"))
    experts = choice.flatten(1).topk(rule.topk, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if rule.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.scaling, experts


class RoutedExperts(Layer):
    """E gated MLPs in two packed tensors, computed in one of three ways (same result up to rounding):

    - Triton, on CUDA: grouped matrix products in five launches, whatever the sizes (`moe_triton.py`);
    - grouped: tokens sorted by expert, one product for each expert that has any. Least work, but the sizes
      depend on the data, so the host must read them: nothing on a CPU;
    - masked: every expert sees every token, and the weight of an expert that was not chosen is 0. Two
      products in all, where a few rows between them choose most experts.
    """

    def __init__(
        self, config: ModelConfig, shared: int = 0, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Behind the E experts lie the matrices of `shared` more, for rows that name them."""
        super().__init__()
        experts, hidden, inter = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        count = experts + shared
        self.all_gate_up = torch.empty((count, 2 * inter, hidden), dtype=dtype, device=device)
        self.all_down = torch.empty((count, hidden, inter), dtype=dtype, device=device)
        self.products = () if shared else ("gate_up_proj", "down_proj")
        self.gate_up_proj = nn.Parameter(self.all_gate_up[:experts], requires_grad=False)
        self.down_proj = nn.Parameter(self.all_down[:experts], requires_grad=False)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x [T, hidden], weights [T, K] float32, experts [T, K] int64 -> [T, hidden]."""
        if x.device.type == "cuda":
            return self.forward_triton(x, weights, experts)
        small = x.shape[0] <= MASKED_CPU_ROWS and 2 * experts.numel() >= len(self.down_proj)
        return (self.forward_masked if small else self.forward_grouped)(x, weights, experts)

    def forward_triton(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        from sglang.srt.layers.moe_triton import routed_experts  # Triton is there where CUDA is

        return routed_experts(x, weights, experts, self.all_gate_up, self.all_down)

    def forward_grouped(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        pairs = experts.flatten()
        order = pairs.argsort(stable=True)
        tokens = order // experts.shape[1]
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        start = 0
        for expert, count in enumerate(torch.bincount(pairs, minlength=len(self.down_proj)).tolist()):
            if count:
                rows = slice(start, start + count)
                inner = silu_and_mul(F.linear(x[tokens[rows]], self.gate_up_proj[expert]))
                y = F.linear(inner, self.down_proj[expert]).float()
                out.index_add_(0, tokens[rows], y * weights.flatten()[order[rows], None])
                start += count
        return out.to(x.dtype)

    def forward_masked(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        dense = torch.zeros((x.shape[0], len(self.down_proj)), dtype=torch.float32, device=x.device)
        dense.scatter_(1, experts, weights)  # [T, E]
        gate_up = torch.matmul(x, self.gate_up_proj.transpose(1, 2))  # [E, T, 2 * I]
        y = torch.bmm(silu_and_mul(gate_up), self.down_proj.transpose(1, 2))  # [E, T, hidden]
        return y.float().mul_(dense.t()[..., None]).sum(0).to(x.dtype)


class DeepseekMoE(Layer):
    """Routed experts plus the shared experts that every token visits.

    Where Triton runs, few rows visit a single shared expert as one more of the routed ones, with weight 1: no
    launch is its own.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        options = {"dtype": dtype, "device": device}
        self.joins_shared = runs_triton(device) and config.n_shared_experts == 1
        self.gate = TopkRouter(config, device)
        self.experts = RoutedExperts(config, shared=int(self.joins_shared), **options)
        self.shared_experts = None
        if config.n_shared_experts:
            shared = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = GatedMLP(config.hidden_size, shared, **options)
        if self.joins_shared:
            self.shared_experts.place(self.experts.all_gate_up[-1], self.experts.all_down[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]"""
        if self.joins_shared and len(x) <= JOINED_ROWS:
            return self.experts.forward_triton(x, *self.gate(x, 1))
        weights, experts = self.gate(x)
        out = self.experts(x, weights, experts)
        return out if self.shared_experts is None else out + self.shared_experts(x)
