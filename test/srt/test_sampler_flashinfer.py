"""The choice of the filters of sampling, and how FlashInfer's are put together (the kernels: on a GPU)."""

from __future__ import annotations

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import sampler_flashinfer
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.sampler import keep_mask, sample
from sglang.srt.layers.sampler_flashinfer import FlashInferKeepMask, select_keep_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_FLASHINFER = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is not None, reason="flashinfer is installed"
)


@pytest.mark.parametrize(("name", "device"), [("auto", CPU), ("torch", CPU), ("torch", CUDA)])
def test_torch_filters_where_nothing_else_is_asked_for(name: str, device: torch.device) -> None:
    assert select_keep_mask(name, device) is keep_mask


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="must be auto, torch or flashinfer, got 'pytorch'"):
        select_keep_mask("pytorch", CPU)


@NO_FLASHINFER
def test_flashinfer_by_name_must_be_there_and_auto_says_why_not(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ImportError, match="sampling backend flashinfer: flashinfer-python is not installed"):
        select_keep_mask("flashinfer", CUDA)
    with caplog.at_level(logging.INFO, sampler_flashinfer.__name__):
        assert select_keep_mask("auto", CUDA) is keep_mask
    assert "auto chose torch: flashinfer-python is not installed" in caplog.text


def renorm(probs: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    kept = probs * keep
    return kept / kept.sum(dim=-1, keepdim=True)


def top_k_renorm_probs(probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """FlashInfer's contract in torch: top_k in (0, vocab], int32."""
    assert top_k.dtype == torch.int32 and ((top_k > 0) & (top_k <= probs.shape[1])).all()
    limit = probs.sort(dim=-1, descending=True).values.gather(1, top_k.long()[:, None] - 1)
    return renorm(probs, probs >= limit)


def top_p_renorm_probs(probs: torch.Tensor, top_p: torch.Tensor, is_deterministic: bool) -> torch.Tensor:
    """FlashInfer's contract in torch: top_p in (0, 1)."""
    assert is_deterministic and ((top_p > 0) & (top_p < 1)).all()
    ordered = probs.sort(dim=-1, descending=True).values
    count = ((ordered.cumsum(dim=-1) - ordered) <= top_p[:, None]).sum(dim=-1, keepdim=True)
    return renorm(probs, probs >= ordered.gather(1, count - 1))


def test_the_filters_follow_the_rules_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(top_k_renorm_probs=top_k_renorm_probs, top_p_renorm_probs=top_p_renorm_probs)
    monkeypatch.setattr(sampler_flashinfer, "load_flashinfer", lambda name: library)
    by_library = FlashInferKeepMask(CPU)
    limits = [(1.0, 0, 0.0), (0.9, 0, 0.0), (1.0, 1, 0.0), (1.0, 40, 0.0), (1.0, 600, 0.0), (0.8, 20, 0.0),
              (0.95, 50, 0.05), (1.0, 0, 0.2), (1e-4, 0, 0.0), (1.0, 500, 0.0)]  # fmt: skip
    logits = 3 * torch.randn((len(limits), 500), generator=torch.Generator().manual_seed(3))
    top_p, top_k, min_p = (torch.tensor(values) for values in zip(*limits))
    assert torch.equal(by_library(logits, top_p, top_k, min_p), keep_mask(logits, top_p, top_k, min_p))

    rows = len(limits)
    arguments = (
        logits,
        torch.arange(rows),
        torch.full((rows,), 0.7),
        top_p,
        top_k,
        min_p,
        torch.arange(rows),
    )
    assert torch.equal(sample(*arguments, keep=by_library), sample(*arguments))


def test_norms_on_the_cpu_stay_with_torch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert RMSNorm(8, 1e-6, dtype=dtype, device=CPU).kernel is None
        assert RMSNorm(8, 1e-6, dtype=dtype, device="cpu").kernel is None
