"""A reader that needs a state gets that of its own rows in every pass of a running worker, graphs or not.

What libraries rely on is asserted in each call: the schedule's lengths count a row's slots, which come first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.layers.attention.nsa.schedules import LengthSchedule, ReaderState
from sglang.srt.layers.attention.registry import IMPLEMENTATIONS, SparseAttentionOps
from worker_driver import generate, make_worker, speculative

from scripts.make_dummy_model import make_dummy_model

PROMPTS = [[7, 3, 9, 1], list(range(1, 71))]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dummy_model(tmp_path_factory.mktemp("dummy"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """The tokens, which none of the cases may change."""
    return generate(make_worker(model), PROMPTS, NEW_TOKENS)


@dataclass
class CheckedOps:
    """The torch implementation behind a reader's state that it checks at every call."""

    ops: SparseAttentionOps
    topk: int
    prepared: list[int] = field(default_factory=list)  # rows of each state that was made
    calls: int = 0

    def prepare(self, metadata: Any) -> ReaderState:
        self.prepared.append(metadata.nsa_seqlens_expanded.shape[0])
        schedule = LengthSchedule.create(
            "lengths", metadata, lambda of: of.nsa_seqlens_expanded.clamp(max=self.topk)
        )
        return ReaderState(library=self.prepared[-1], schedules=(schedule,))

    def sparse_mla(self, q_nope, q_rope, kv_buffer, topk_slots, softmax_scale, reader):
        self.calls += 1
        lengths = reader.schedules[0].target
        assert reader.library == topk_slots.shape[0] == lengths.shape[0]
        assert torch.equal(topk_slots >= 0, torch.arange(topk_slots.shape[1]) < lengths[:, None])
        return self.ops.sparse_mla(q_nope, q_rope, kv_buffer, topk_slots, softmax_scale)


@dataclass(frozen=True)
class Case:
    name: str
    steps: int | None = 5
    precompute: bool = True
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain", steps=None, precompute=False),
    Case("plain-no-graph", steps=None, precompute=False, args={"disable_cuda_graph": True}),
    Case("recompute", precompute=False),
    *(
        Case(f"{layout}-{rule}", args={"nsa_metadata_layout": layout, "nsa_draft_seqlens": rule})
        for layout in ("replicate", "shared", "in_graph", "indirect")
        for rule in ("committed", "step")
    ),
    Case("no-graph", args={"disable_cuda_graph": True}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_are_those_of_the_rows_in_every_pass(
    case: Case, model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[CheckedOps] = []

    def build(dims, device):
        built.append(CheckedOps(IMPLEMENTATIONS["torch_alone"].build(dims, device), dims.index_topk))
        ops = built[-1]
        return replace(ops.ops, sparse_mla=ops.sparse_mla, prepare=ops.prepare)

    monkeypatch.setitem(IMPLEMENTATIONS, "torch_alone", IMPLEMENTATIONS["torch"])
    monkeypatch.setitem(IMPLEMENTATIONS, "torch", replace(IMPLEMENTATIONS["torch"], build=build))
    speculation = {} if case.steps is None else speculative(case.steps)
    with (
        envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA.override(case.precompute),
        envs.SGLANG_NSA_VERIFY_METADATA.override(True),
    ):
        worker = make_worker(model, **speculation, **case.args)
        prefill, decode = built
        before = len(decode.prepared)
        assert generate(worker, PROMPTS, NEW_TOKENS) == expected
    assert prefill.calls and decode.calls
    assert prefill.prepared[0] == sum(map(len, PROMPTS))
    if case.args.get("disable_cuda_graph"):
        assert before == 0 and len(decode.prepared) > NEW_TOKENS / 6
    else:
        assert len(decode.prepared) == before > 0  # made at capture; replays only refresh
