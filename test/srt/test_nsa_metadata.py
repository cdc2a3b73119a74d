"""The reference computation against plain loops, and replays against eager passes."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_cases import (
    DEVICES,
    EXPANDED,
    MODES,
    POISON,
    Batch,
    MetadataCase,
    StaticInputs,
    assert_live_equal,
    graph_metadata,
    poison_all,
    random_batch,
    reference_metadata,
    replay,
)
from sglang.srt.layers.attention.nsa.metadata import (
    FIELDS,
    MetadataBuffers,
    MetadataMode,
    as_backend_metadata,
    fields_of,
)
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import precompute_metadata
from sglang.srt.model_executor.graph_runner import GraphRunner


@st.composite
def cases_and_batches(draw) -> tuple[MetadataCase, Batch]:
    page_size = draw(st.sampled_from([1, 3, 8, 64]))
    case = MetadataCase(
        mode=draw(st.sampled_from(MODES)),
        max_bs=draw(st.integers(0, 6)),
        page_size=page_size,
        rows_per_req=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        width=draw(st.sampled_from([64, 80])),
        topk=draw(st.sampled_from([1, 7, 48, 2048])),
    )
    requests = draw(st.lists(st.integers(0, case.pool - 1), min_size=case.max_bs, max_size=case.max_bs))
    lens = draw(st.lists(st.integers(1, case.width - 5), min_size=case.max_bs, max_size=case.max_bs))
    # More accepted than there are keys is what padded rows of other engines say: lengths clamp at 0.
    accept = draw(st.lists(st.integers(0, case.rows_per_req), min_size=case.max_bs, max_size=case.max_bs))
    return case, Batch(tuple(lens), tuple(requests), tuple(accept))


@settings(max_examples=200, deadline=None)
@given(cases_and_batches(), st.integers(-2, 4), st.booleans())
def test_precompute_equals_loops(case_and_batch, offset, bounded):
    case, batch = case_and_batch
    if case.mode is not MetadataMode.DECODE:
        offset = 0
    inputs = StaticInputs(case)
    inputs.load(batch)
    bound = max(batch.seq_lens, default=0) + max(offset, case.shape.rows_per_req)
    computed = precompute_metadata(
        inputs.view(batch.bs), seqlens_offset=offset, max_len=bound if bounded else None
    )
    assert_live_equal(reference_metadata(case, inputs.table, batch, offset), computed)


def test_known_values():
    """One batch written out by hand, so that the loops are tested too."""
    case = MetadataCase(mode=MetadataMode.DRAFT_EXTEND, page_size=2, rows_per_req=3, topk=4, width=8)
    batch = Batch(seq_lens=(5, 1), requests=(2, 0), accept_lens=(2, 0))
    inputs = StaticInputs(case)
    inputs.req_to_token[2] = torch.tensor([10, 11, 20, 21, 6, 7, 8, 9])
    inputs.load(batch)
    computed = precompute_metadata(inputs.view(2))
    assert computed.cache_seqlens.tolist() == [5, 1]
    assert computed.cu_seqlens_k.tolist() == [0, 5, 6]
    assert computed.seqlens_expanded.tolist() == [4, 5, 0, 0, 0, 0]
    assert computed.nsa_cache_seqlens.tolist() == [4, 4, 0, 0, 0, 0]
    assert computed.nsa_cu_seqlens_k.tolist() == [0, 4, 8, 8, 8, 8, 8]
    assert computed.page_indices[1, :5].tolist() == [10, 11, 20, 21, 6]
    assert computed.real_page_table[1, :3].tolist() == [5, 10, 3]


def test_draft_extend_needs_accept_lens():
    case = MetadataCase(mode=MetadataMode.DECODE)
    inputs = StaticInputs(case).view(0)
    broken = type(inputs)(
        MetadataCase(mode=MetadataMode.DRAFT_EXTEND, max_bs=0).shape,
        inputs.seq_lens,
        inputs.req_pool_indices,
        inputs.req_to_token,
    )
    with pytest.raises(ValueError, match="accept_lens"):
        precompute_metadata(broken)


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("mode", MODES)
def test_buffers_do_not_overlap_and_are_aligned(mode, page_size):
    case = MetadataCase(mode=mode, max_bs=5, page_size=page_size, rows_per_req=3)
    buffers = MetadataBuffers.create(case.shape, torch.device("cpu"))
    for bs in range(case.max_bs + 1):
        metadata = buffers.view(bs)
        seen: dict[int, str] = {}
        for field in fields_of(mode):
            tensor = field.of(metadata)
            if tensor is None:
                continue
            assert tensor.data_ptr() % 16 == 0 or field.is_table, field.backend
            for address in range(tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel(), 4):
                assert seen.setdefault(address, field.backend) == field.backend
    aliased = buffers.view(case.max_bs)
    same = aliased.nsa_seqlens_expanded.data_ptr() == aliased.cache_seqlens_int32.data_ptr()
    assert same == (mode is MetadataMode.DECODE)


def test_every_tensor_of_the_metadata_is_in_the_table():
    backend = {field.backend.split(".")[0] for field in FIELDS}
    precomputed = {field.precomputed.split(".")[0] for field in FIELDS}
    case = MetadataCase(mode=MetadataMode.TARGET_VERIFY)
    metadata = MetadataBuffers.create(case.shape, torch.device("cpu")).view(2)
    assert (
        set(vars(metadata)) - {"shape", "requests", "reader"} == backend
    )  # schedules are checked in test_schedules.py
    inputs = StaticInputs(case)
    inputs.load(Batch((3,), (1,), (1,)))
    assert set(vars(precompute_metadata(inputs.view(1)))) - {"shape"} == precomputed


REPLAYS = [
    MetadataCase(mode, page_size=page_size, draft_seqlens=draft_seqlens, dtype=dtype)
    for mode in MODES
    for page_size, draft_seqlens, dtype in [(64, "committed", torch.int32), (1, "step", torch.int64)]
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["recompute", "replicate", "shared", "in_graph", "indirect"])
@pytest.mark.parametrize("case", REPLAYS, ids=str)
def test_replay_equals_eager(case, layout, device):
    """Below and at captured sizes, right after a larger batch, with padding, poison and bs 0."""
    captured = (0, 2, 4, 8)
    runner: GraphRunner[None] = GraphRunner("test", torch.device(device), captured)
    inputs = StaticInputs(case, device)
    graph = graph_metadata(case, inputs, layout, batch_sizes=captured)
    rng = random.Random(3)
    for bs in (8, 3, 2, 0, 7, 1, 4, 0, 8, 5, 6):
        batch = random_batch(case, bs, rng)
        padded = batch.padded(runner.padded(bs))
        if bs % 2:
            poison_all(graph)  # else what the last, often larger, batch left behind
        inputs.load(padded)
        replay(graph, padded.bs, inputs.max_len(padded))
        graph.check(padded.bs)
        for offset, metadata in zip(case.offsets, graph.backends[padded.bs]):
            assert_live_equal(reference_metadata(case, inputs.table, padded, offset), metadata)
            eager = as_backend_metadata(precompute_metadata(inputs.view(bs), seqlens_offset=offset))
            assert_live_equal(reference_metadata(case, inputs.table, batch, offset), eager)
            assert_prefix_equal(eager, metadata)


def assert_prefix_equal(eager, replayed) -> None:
    """The replay of a padded batch begins with what the eager pass of the real requests reads."""
    lengths = eager.nsa_seqlens_expanded.tolist()
    for field in fields_of(eager.shape.mode):
        want, have = field.of(eager), field.of(replayed)
        if want is None or (replayed.requests is not None and field.is_table):
            assert have is None
        elif field.is_table:
            page = eager.shape.page_size if field.backend == "real_page_table" else 1
            for row, length in enumerate(lengths):
                columns = -(-length // page)
                assert torch.equal(want[row, :columns], have[row, :columns]), (field.backend, row)
        else:
            assert torch.equal(want, have[: want.shape[0]]), field.backend


def test_sizes_above_the_largest_captured_are_eager():
    runner: GraphRunner[None] = GraphRunner("test", torch.device("cpu"), [2, 8])
    assert [runner.padded(bs) for bs in (0, 1, 2, 3, 8, 9)] == [2, 2, 2, 8, 8, None]


@pytest.mark.parametrize("mode", EXPANDED)
def test_dead_columns_of_the_token_table_are_never_needed(mode):
    """Whatever stands at or past a row's length in req_to_token, the live metadata is the same."""
    case = MetadataCase(mode)
    batch = random_batch(case, case.max_bs, random.Random(5))
    inputs = StaticInputs(case)
    inputs.load(batch)
    expected = reference_metadata(case, inputs.table, batch)
    for request, length in zip(batch.requests, batch.seq_lens):
        inputs.req_to_token[request, length + case.rows_per_req :] = POISON
    for layout in ("replicate", "shared", "indirect"):
        graph = graph_metadata(case, inputs, layout)
        poison_all(graph)
        replay(graph, case.max_bs, inputs.max_len(batch))
        for metadata in graph.backends[case.max_bs]:
            assert_live_equal(expected, metadata)
