"""Mixture of experts: each of the ways against transformers' module."""

from __future__ import annotations

import os

import pytest
import torch
from sglang.srt.layers import moe
from sglang.srt.model_config import ModelConfig
from tiny_models import TINY, reference_model
from tiny_models import ModelCase as Case

CASES = [
    Case("groups"),
    Case("one_group", {"n_group": 1, "topk_group": 1}),
    Case("all_groups", {"topk_group": 4}),
    Case("one_expert", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    Case("shared_2", {"n_shared_experts": 2}),
]
# Triton's kernels run on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WAYS = ["forward_grouped", "forward_masked", *(["forward_triton"] if INTERPRETED else [])]


def our_config(case: Case) -> ModelConfig:
    names = {k: v for k, v in case.config.items() if k in ModelConfig.__dataclass_fields__}
    return ModelConfig(**names)


def load(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Copies transformers' weights, stacking gate and up of the shared experts."""
    weights = dict(theirs.state_dict())
    halves = [weights.pop(f"shared_experts.{part}_proj.weight") for part in ("gate", "up")]
    weights["shared_experts.gate_up_proj.weight"] = torch.cat(halves)
    ours.load_state_dict(weights)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [0, 1, 2, 29])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_way_equals_transformers(case: Case, way: str, rows: int, monkeypatch) -> None:
    theirs = reference_model(case).model.layers[1].mlp
    ours = moe.DeepseekMoE(our_config(case), dtype=torch.float32, device="cpu")
    load(ours, theirs)
    monkeypatch.setattr(ours.experts, "forward", getattr(ours.experts, way))
    x = torch.randn(rows, TINY["hidden_size"], generator=torch.Generator().manual_seed(1))
    out = ours(x)
    assert out.shape == x.shape
    if rows:
        torch.testing.assert_close(out, theirs(x[None])[0], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 40, 300, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu_and_can_be_captured(dtype: torch.dtype, rows: int) -> None:
    theirs = reference_model(Case("gpu")).model.layers[1].mlp
    config = our_config(Case("gpu"))
    on_cpu = moe.DeepseekMoE(config, dtype=torch.float32, device="cpu")
    on_cuda = moe.DeepseekMoE(config, dtype=dtype, device="cuda")
    load(on_cpu, theirs)
    on_cuda.load_state_dict(on_cpu.state_dict())
    x = torch.randn(rows, config.hidden_size).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    static = x.cuda()
    eager = on_cuda(static)
    torch.testing.assert_close(eager.float().cpu(), on_cpu(x.float()), rtol=tolerance, atol=tolerance * 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = on_cuda(static)
    graph.replay()
    torch.testing.assert_close(captured, eager, rtol=tolerance, atol=tolerance * 10)


@torch.inference_mode()
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 160, 5000])
def test_many_experts_of_which_some_have_no_row(rows: int) -> None:
    """DeepSeek's proportions: 256 experts, 8 of them a row, and sizes that fill no tile."""
    from sglang.srt.layers.moe_triton import routed_experts

    generator = torch.Generator("cuda").manual_seed(rows)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device="cuda").bfloat16() / 8

    x, gate_up, down = normal(rows, 200), normal(256, 2 * 72, 200), normal(256, 200, 72)
    experts = torch.rand((rows, 250), generator=generator, device="cuda").topk(8).indices
    weights = torch.rand((rows, 8), generator=generator, device="cuda")
    out = routed_experts(x, weights, experts, gate_up, down)
    gate, up = torch.einsum("th,eih->eti", x.float(), gate_up.float()).chunk(2, dim=-1)
    every = torch.einsum("eti,ehi->teh", torch.nn.functional.silu(gate) * up, down.float())  # [T, E, hidden]
    expected = (every.gather(1, experts[..., None].expand(-1, -1, 200)) * weights[..., None]).sum(1)
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2 * expected.abs().max().item())
