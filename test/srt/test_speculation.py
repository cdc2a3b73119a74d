"""Speculative decoding changes how fast tokens come, never which: with random and with rigged models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.speculative.eagle_info import count_accepted
from worker_driver import generate, make_worker, speculative

from scripts.make_dummy_model import make_dummy_model

PROMPTS = [
    torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 59, 27)  # with the new tokens beyond a page, and beyond the indexer's top-k
]
NEW_TOKENS = 16
Temperatures = tuple[float, ...]
GREEDY: Temperatures = (0.0, 0.0, 0.0)  # captured apart from the others
MIXED: Temperatures = (0.9, 0.0, 0.9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dummy_model(tmp_path_factory.mktemp("dummy"))


@pytest.fixture(scope="module")
def plain(model: Path) -> dict[Temperatures, list[list[int]]]:
    """What decoding without drafts says."""
    worker = make_worker(model, disable_cuda_graph=True)
    return {t: generate(worker, PROMPTS, NEW_TOKENS, t) for t in (GREEDY, MIXED)}


@dataclass(frozen=True)
class Case:
    name: str
    steps: int = 3
    precompute: bool = True
    args: dict[str, Any] = field(default_factory=dict)
    temperatures: tuple[Temperatures, ...] = (MIXED,)


BOTH = (GREEDY, MIXED)
CASES = [
    Case("baseline", precompute=False, temperatures=BOTH),
    Case("one-step", steps=1),
    Case("many-steps", steps=9),
    Case("no-graph", args={"disable_cuda_graph": True}),
    Case("no-graph-baseline", precompute=False, args={"disable_cuda_graph": True}),
    Case("above-captured", args={"cuda_graph_max_bs": 2}),
    Case("page-size-1", args={"page_size": 1}),
    Case("page-size-16", args={"page_size": 16}),
    Case("committed", args={"nsa_draft_seqlens": "committed"}),
    *(
        Case(f"copy-{copy}", args={"nsa_metadata_copy": copy}, temperatures=temperatures)
        for copy, temperatures in (("torch", (MIXED,)), ("direct", (MIXED,)), ("fused", BOTH))
    ),
    *(
        Case(
            f"{layout}-{rule}",
            args={"nsa_metadata_layout": layout, "nsa_draft_seqlens": rule},
            temperatures=temperatures,
        )
        for layout in ("shared", "in_graph", "indirect")
        for rule, temperatures in (("committed", (MIXED,)), ("step", BOTH))
    ),
]


CUDA_CASES = [
    *(
        Case(f"decode-{ops}-{layout}", args={"nsa_decode_backend": ops, "nsa_metadata_layout": layout})
        for ops in ("torch", "triton")
        for layout in ("replicate", "indirect")
    ),
]
ON_DEVICES = [pytest.param(case, "cpu", id=f"cpu-{case.name}") for case in CASES] + [
    pytest.param(case, "cuda", id=f"cuda-{case.name}", marks=pytest.mark.gpu) for case in CASES + CUDA_CASES
]


@pytest.mark.parametrize(("case", "device"), ON_DEVICES)
def test_same_tokens_with_every_metadata_path(
    case: Case, device: str, model: Path, plain: dict[Temperatures, list[list[int]]]
) -> None:
    """On both devices the tokens are those of plain decoding on the CPU."""
    with (
        envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA.override(case.precompute),
        envs.SGLANG_NSA_VERIFY_METADATA.override(True),
    ):
        worker = make_worker(model, device=device, dtype="float32", **speculative(case.steps, **case.args))
        for temperatures in case.temperatures:
            assert generate(worker, PROMPTS, NEW_TOKENS, temperatures) == plain[temperatures]
    state = worker.internal_state()
    assert state["nsa_metadata"]["draft_backends"] == case.steps - 1
    assert (state["nsa_metadata"]["replays"] > 0) == (not case.args.get("disable_cuda_graph"))
    assert 1 <= state["avg_spec_accept_length"] <= case.steps + 1


@pytest.mark.parametrize("args", [{}, speculative(3)], ids=["plain", "speculative"])
def test_verification_compares_the_lengths_of_host_and_device(model: Path, args: dict[str, Any]) -> None:
    """The metadata would be right for the device's lengths, and too short where the host counts less."""
    with envs.SGLANG_NSA_VERIFY_METADATA.override(True):
        worker = make_worker(model, **args)
    generate(worker, PROMPTS, 3)
    decode = worker.decode

    def decode_with_a_lost_token(reqs: list[Any]) -> Any:
        reqs[1].kv_len -= 1
        return decode(reqs)

    worker.decode = decode_with_a_lost_token
    with pytest.raises(
        RuntimeError, match=r"request r1: kv_len of the host is 58, seq_lens of the device 59"
    ):
        generate(worker, PROMPTS, 3)


@pytest.mark.parametrize("layout", ["replicate", "in_graph", "indirect"])
def test_decode_without_drafts_has_the_layouts_too(
    layout: str, model: Path, plain: dict[Temperatures, list[list[int]]]
) -> None:
    with (
        envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA.override(True),
        envs.SGLANG_NSA_VERIFY_METADATA.override(True),
    ):
        worker = make_worker(model, nsa_metadata_layout=layout)
        assert generate(worker, PROMPTS, NEW_TOKENS, MIXED) == plain[MIXED]
    assert worker.internal_state()["nsa_metadata"]["replays"] > 0


def rig(worker: Any, drafts_are_right: bool) -> None:
    """A target that says t + 1 after t, and a NextN layer that is always right, or never.

    Attention and MLPs add nothing, so a hidden state is its token's embedding. The NextN layer is right
    where it looks at the token it is given, and one behind where it looks at the target's hidden state.
    """
    target, nextn = worker.target.model, worker.nextn.model
    for name, weight in [*target.named_parameters(), *nextn.named_parameters()]:
        if weight.dim() >= 2 and "embed" not in name and "lm_head" not in name:
            weight.zero_()
    embed = target.model.embed_tokens.weight
    embed.normal_(generator=torch.Generator().manual_seed(0))
    target.lm_head.weight.copy_(embed.roll(1, dims=0))
    half = slice(0, embed.shape[1]) if drafts_are_right else slice(embed.shape[1], None)
    nextn.eh_proj.weight[:, half].copy_(torch.eye(embed.shape[1]))


@pytest.mark.parametrize("temperature", [0.0, 0.01])
@pytest.mark.parametrize("drafts_are_right", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
def test_rigged_drafts(model: Path, steps: int, drafts_are_right: bool, temperature: float) -> None:
    worker = make_worker(model, **speculative(steps))
    with torch.inference_mode():
        rig(worker, drafts_are_right)
    vocab = worker.vocab_size
    outputs = generate(worker, PROMPTS, NEW_TOKENS, [temperature] * len(PROMPTS))
    for prompt, output in zip(PROMPTS, outputs):
        assert output == [(prompt[-1] + 1 + i) % vocab for i in range(NEW_TOKENS)]
    expected = steps + 1 if drafts_are_right else 1
    assert worker.internal_state()["avg_spec_accept_length"] == expected


@pytest.mark.parametrize(
    ("drafts", "target", "accepted"),
    [
        ([], [7], 1),
        ([1, 2, 3], [1, 2, 3, 4], 4),
        ([1, 2, 3], [1, 2, 9, 4], 3),
        ([1, 2, 3], [9, 2, 3, 4], 1),  # right drafts after a wrong one do not count
        ([5, 5, 5], [5, 6, 5, 5], 2),
    ],
)
def test_count_accepted(drafts: list[int], target: list[int], accepted: int) -> None:
    draft_tokens = torch.tensor([drafts], dtype=torch.int64).view(1, len(drafts))
    assert count_accepted(draft_tokens, torch.tensor([target])).tolist() == [accepted]
