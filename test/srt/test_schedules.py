"""Schedules that follow the lengths: what they hold, and that every backend's is fresh at every replay."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.attention.nsa.metadata import MetadataMode, MetadataShape
from sglang.srt.layers.attention.nsa.metadata_check import MetadataMismatchError
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs
from sglang.srt.layers.attention.nsa.paths import GraphMetadata, MetadataSelection
from sglang.srt.layers.attention.nsa.schedules import paged_mqa_logits_schedule, prepare_paged_mqa

SEGMENT = 256
NUM_SMS = 132


def reference_schedule(context_lens: list[list[int]], num_sms: int) -> list[list[int]]:
    """The same by listing all segments: where each SM starts, and the end."""
    atoms = -(-len(context_lens[0]) // 2) if context_lens else 1
    segments = [
        [request * atoms + atom, segment]
        for request, lens in enumerate(context_lens)
        for atom in range(atoms)
        for segment in range(-(-lens[-1] // SEGMENT))
    ]
    share, rest = divmod(len(segments), num_sms)
    ends = [*segments, [len(context_lens) * atoms, 0]]
    return [ends[sm * share + min(sm, rest)] for sm in range(num_sms + 1)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 9), next_n=st.integers(1, 5), num_sms=st.integers(1, 140))
def test_schedule_is_an_even_split_of_all_segments(
    data: st.DataObject, batch: int, next_n: int, num_sms: int
) -> None:
    length = st.one_of(st.integers(0, 3), st.integers(250, 260), st.integers(0, 20000))
    lens = data.draw(
        st.lists(st.lists(length, min_size=next_n, max_size=next_n), min_size=batch, max_size=batch)
    )
    schedule = paged_mqa_logits_schedule(torch.tensor(lens, dtype=torch.int32), num_sms)
    assert schedule.dtype == torch.int32
    assert schedule.tolist() == reference_schedule(lens, num_sms)


@pytest.mark.parametrize("lens", [[], [0], [0, 0, 0], [1], [256], [257], [0, 300, 0]])
def test_schedule_of_one_row_a_request(lens: list[int]) -> None:
    schedule = paged_mqa_logits_schedule(torch.tensor(lens, dtype=torch.int32), NUM_SMS)
    assert schedule.shape == (NUM_SMS + 1, 2)
    assert schedule.tolist() == reference_schedule([[n] for n in lens], NUM_SMS)


@dataclass(frozen=True)
class PathCase:
    layout: str
    offsets: tuple[int, ...]
    mode: MetadataMode = MetadataMode.DECODE
    rows_per_req: int = 1

    def __str__(self) -> str:
        return f"{self.layout}-{self.mode.name}-{','.join(map(str, self.offsets))}"


STEP, COMMITTED = (1, 2, 3, 4, 5, 6, 7), (0,) * 5  # more backends than SGLang's copy for three serves
CASES = [
    *(PathCase(layout, offsets) for layout in ("recompute", "replicate", "shared", "in_graph", "indirect")
      for offsets in (STEP, COMMITTED)),
    PathCase("shared", (0,), MetadataMode.TARGET_VERIFY, 4),
    PathCase("in_graph", (0,), MetadataMode.DRAFT_EXTEND, 4),
    PathCase("indirect", (0,), MetadataMode.TARGET_VERIFY, 4),
]  # fmt: skip


def planned_graph(case: PathCase, bs: int = 3) -> tuple[GraphMetadata, MetadataInputs]:
    shape = MetadataShape(case.mode, bs, case.rows_per_req, width=2048, page_size=64, topk=128)
    inputs = MetadataInputs(
        shape=shape,
        seq_lens=torch.ones(bs, dtype=torch.int32),
        req_pool_indices=torch.arange(bs, dtype=torch.int32),
        req_to_token=torch.arange(bs * 2048, dtype=torch.int32).view(bs, 2048),
        accept_lens=(
            torch.tensor([1, 4, 2], dtype=torch.int32) if case.mode is MetadataMode.DRAFT_EXTEND else None
        ),
    )
    enabled = case.layout != "recompute"
    selection = MetadataSelection(enabled, case.layout if enabled else "replicate", "torch")
    graph = GraphMetadata(
        selection,
        shape,
        case.offsets,
        torch.device("cpu"),
        prepare=prepare_paged_mqa(NUM_SMS),
        reads=frozenset({"nsa_seqlens_expanded"}),
    )
    graph.capture(inputs)
    return graph, inputs


def replay(graph: GraphMetadata, bs: int) -> None:
    graph.replay(bs, -1)
    graph.run_in_graph(bs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backend_gets_a_fresh_schedule_at_every_replay(case: PathCase) -> None:
    graph, inputs = planned_graph(case)
    targets = [metadata.reader.schedules[0].target for metadata in graph.backends[3]]
    for lens in ([255, 700, 1], [256, 5, 1500], [1, 1, 1]):
        inputs.seq_lens.copy_(torch.tensor(lens))
        for target in targets:
            target.fill_(-7)  # whatever is not refreshed shows
        replay(graph, 3)
        for metadata, target in zip(graph.backends[3], targets):
            rows = [[n] for n in metadata.nsa_seqlens_expanded.tolist()]
            assert metadata.reader.schedules[0].target is target  # graphs read fixed addresses
            assert target.tolist() == reference_schedule(rows, NUM_SMS)
    assert len(targets) == len(case.offsets)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_checker_names_a_stale_schedule_in_any_backend(case: PathCase) -> None:
    graph, inputs = planned_graph(case)
    inputs.seq_lens.copy_(torch.tensor([600, 900, 1]))
    replay(graph, 3)
    graph.check(3)
    for index, metadata in enumerate(graph.backends[3]):
        target = metadata.reader.schedules[0].target
        target[2, 1] += 1
        with pytest.raises(MetadataMismatchError) as raised:
            graph.check(3)
        difference = raised.value.difference
        assert difference.field == "paged_mqa_schedule_metadata"
        aliased = [m.reader.schedules[0].target is target for m in graph.backends[3]]
        assert difference.backend == aliased.index(True) <= index
        assert (difference.row, difference.column) == (2, 1)
        assert difference.found == difference.expected + 1
        target[2, 1] -= 1
    graph.check(3)


def test_backends_of_equal_lengths_share_a_schedule_where_they_share_buffers() -> None:
    graph, _ = planned_graph(PathCase("shared", COMMITTED))
    assert len({m.reader.schedules[0].target.data_ptr() for m in graph.backends[3]}) == 1
    graph, _ = planned_graph(PathCase("replicate", COMMITTED))
    assert len({m.reader.schedules[0].target.data_ptr() for m in graph.backends[3]}) == len(COMMITTED)


def test_schedules_outlive_a_fallback() -> None:
    """Replanning in torch keeps the tensors that graphs read, and goes on refreshing them."""
    graph, inputs = planned_graph(PathCase("replicate", STEP))
    before = [m.reader.schedules[0].target.data_ptr() for m in graph.backends[3]]
    graph.selection = replace(graph.selection, copy="auto")
    graph._fall_back(RuntimeError("a test"))
    inputs.seq_lens.fill_(800)
    replay(graph, 3)
    graph.check(3)
    assert [m.reader.schedules[0].target.data_ptr() for m in graph.backends[3]] == before
