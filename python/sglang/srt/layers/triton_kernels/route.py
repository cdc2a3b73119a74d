"""The router's choice: from logits to the chosen experts and their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs

if TYPE_CHECKING:
    from sglang.srt.layers.moe import RoutingRule


@triton.jit
def _route_kernel(
    logits,  # [T, E], float32
    bias,  # [E], float32
    weights,  # [T, K + SHARED], float32
    experts,  # [T, K + SHARED], int64
    num_experts,
    group_size,
    scaling,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOPK: tl.constexpr,
    NORMALISE: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row. Of equal values the lower index is preferred."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < num_experts
    none = float("-inf")
    score = tl.sigmoid(tl.load(logits + row * num_experts + at, mask=inside, other=0.0))
    choice = tl.where(inside, score + tl.load(bias + at, mask=inside, other=0.0), none)
    if TOP_GROUPS < GROUPS:
        group = at // group_size
        # Each expert holds its group's value: the sum of the two highest choices in it.
        value = tl.full((BLOCK,), none, dtype=tl.float32)
        for g in tl.static_range(GROUPS):
            members = tl.where(group == g, choice, none)
            first = tl.max(members, axis=0)
            second = tl.max(tl.where(at == tl.argmax(members, axis=0), none, members), axis=0)
            value = tl.where(group == g, first + second, value)
        value = tl.where(inside, value, none)
        open_ = tl.zeros((BLOCK,), dtype=tl.int1)
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.argmax(tl.where(open_, none, value), axis=0) // group_size
            open_ = open_ | (group == best)
        choice = tl.where(open_ & inside, choice, none)
    total = tl.zeros((), dtype=tl.float32)
    for _ in tl.static_range(TOPK):
        best = tl.argmax(choice, axis=0)
        total += tl.sum(tl.where(at == best, score, 0.0), axis=0)
        choice = tl.where(at == best, none, choice)
    # The same walk again, now that the sum is known.
    taken = inside & (choice == none)
    if TOP_GROUPS < GROUPS:
        taken = taken & open_
    factor = scaling / (total + 1e-20) if NORMALISE else scaling
    rank = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    weights += row * (TOPK + SHARED)
    experts += row * (TOPK + SHARED)
    tl.store(weights + rank, score * factor, mask=taken)
    tl.store(experts + rank, at.to(tl.int64), mask=taken)
    for i in tl.static_range(SHARED):
        tl.store(weights + TOPK + i, 1.0)
        tl.store(experts + TOPK + i, (num_experts + i).to(tl.int64))


def route(
    logits: torch.Tensor,  # [T, E], float32
    bias: torch.Tensor,  # [E], float32
    rule: RoutingRule,
    shared: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `moe.choose_experts`: weights [T, K] float32 and experts [T, K] int64, here by rising number. Behind
    them come `shared` experts that every row visits with weight 1: numbers E, E + 1, ..."""
    rows, num_experts = logits.shape
    weights = torch.empty((rows, rule.topk + shared), dtype=torch.float32, device=logits.device)
    experts = torch.empty((rows, rule.topk + shared), dtype=torch.int64, device=logits.device)
    if rows:
        _route_kernel[(rows,)](
            logits,
            bias,
            weights,
            experts,
            num_experts,
            num_experts // rule.groups,
            rule.scaling,
            GROUPS=rule.groups,
            TOP_GROUPS=rule.top_groups,
            TOPK=rule.topk,
            NORMALISE=rule.normalise,
            SHARED=shared,
            BLOCK=triton.next_power_of_2(num_experts),
            num_warps=1,
            **dependent_launch(logits.device),
        )
    return weights, experts
