"""torch.compile(fullgraph=True) goes through every run and call, and keeps its order with what is around it.

Without fake kernels it raised; and a plan's tensors have to be known to the compiler, or what reads them may
be moved before what writes them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sgl_kernel
import torch
from sgl_kernel import (
    CopyRegion,
    DecodeInputsPlan,
    FusedMetadataCopyPlan,
    MetadataDestination,
    NSAMetadataGeneratePlan,
    PagedMQASchedule,
    PagedMQASchedulePlan,
    ReplayCopyPlan,
    ReplayField,
)
from test_index_scores import good as good_scores
from test_index_scores import require_served
from test_replay_copy import good as good_replay
from test_sglang_calls import good_arguments

Setup = Callable[[str], tuple[torch.Tensor, torch.Tensor, Callable[[], None]]]


def copy(device: str) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    """(what is read, what is written, the call between them)."""
    source = torch.arange(12, dtype=torch.int32, device=device).view(3, 4)
    written = torch.zeros(3, 4, dtype=torch.int32, device=device)
    plan = FusedMetadataCopyPlan([CopyRegion(source, (written, torch.zeros_like(written)), cols_per=1)])
    return source, written, lambda: plan.run(max_len=3)


def generate(device: str) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    lens = torch.tensor([3, 7], dtype=torch.int32, device=device)
    written = torch.zeros(2, dtype=torch.int32, device=device)
    plan = NSAMetadataGeneratePlan(
        mode=0,
        bs=2,
        seq_lens=lens,
        req_pool_indices=torch.tensor([1, 2], device=device),
        req_to_token=torch.arange(30, dtype=torch.int32, device=device).view(3, 10),
        destinations=[MetadataDestination(cache_seqlens=written, seqlens_offset=1)],
        page_size=64,
        topk=4,
    )
    return lens, written, plan.run


def schedule(device: str) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    lens = torch.tensor([300, 7], dtype=torch.int32, device=device)
    written = torch.zeros(5, 2, dtype=torch.int32, device=device)
    return lens, written, PagedMQASchedulePlan([PagedMQASchedule(lens, written)]).run


def sglang(device: str) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    arguments = good_arguments(device)
    call = lambda: sgl_kernel.fused_metadata_copy_cuda(**arguments)  # noqa: E731
    return arguments["page_indices_src"], arguments["page_table_1_dst"], call


def replay(device: str) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    source = torch.arange(6, dtype=torch.int32, device=device)
    written = torch.zeros(8, dtype=torch.int32, device=device)
    plan = ReplayCopyPlan([ReplayField("lengths", written, extra=1)])
    return source, written, lambda: plan.run([source], 5)


def replay_call(device: str) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    arguments = good_replay(device)
    call = lambda: sgl_kernel.fused_copy_replay_data(**arguments)  # noqa: E731
    return arguments["src_page_table"], arguments["dst_page_table"], call


def inputs(device: str) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    tokens, written = torch.zeros(2, 300, dtype=torch.int32, device=device), []
    for _ in range(3):
        written.append(torch.zeros(2, dtype=torch.int32, device=device))
    plan = DecodeInputsPlan(
        bs=2,
        seq_lens=torch.tensor([3, 7], device=device),
        req_pool_indices=torch.tensor([1, 0], device=device),
        req_to_token=torch.arange(600, dtype=torch.int32, device=device).view(2, 300),
        token_pool=tokens,
        input_ids=written[0],
        out_cache_loc=written[1],
        positions=written[2],
    )
    return tokens, written[0], plan.run


def topk(device: str) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    scores = torch.zeros(2, 8, device=device)
    written = torch.zeros(2, 3, dtype=torch.int32, device=device)
    table = torch.arange(16, dtype=torch.int32, device=device).view(2, 8)
    lengths = torch.tensor([2, 7], dtype=torch.int32, device=device)
    return scores, written, lambda: sgl_kernel.topk_slots(scores, table, None, lengths, written, width=8)


def scores(device: str) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    arguments = good_scores(device)
    arguments["q_index"].fill_(1), arguments["index_k"].fill_(1)
    return arguments["index_weights"], arguments["scores"], lambda: sgl_kernel.index_scores(**arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "setup", [copy, generate, schedule, sglang, replay, replay_call, inputs, topk, scores]
)
def test_fullgraph(setup: Setup, backend: str, device: str) -> None:
    if setup is scores:
        require_served(device)

    def outputs(compiled: bool) -> list[torch.Tensor]:
        source, written, call = setup(device)

        def step(more: torch.Tensor) -> tuple[torch.Tensor, ...]:
            before = written + 1
            source.add_(more)
            call()
            between = written * 2
            written.sub_(1)
            source.add_(more)
            call()
            return before, between, written + 0

        torch._dynamo.reset()
        function = torch.compile(step, fullgraph=True, backend=backend) if compiled else step
        results = [*function(torch.tensor(1)), *function(torch.tensor(250))]
        return [*(r.clone() for r in results), source, written]

    for found, expected in zip(outputs(True), outputs(False), strict=True):
        assert torch.equal(found, expected)
