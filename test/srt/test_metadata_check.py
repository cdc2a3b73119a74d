"""Verification: one wrong element, anywhere, is found and named."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from nsa_cases import (
    DEVICES,
    MODES,
    MetadataCase,
    StaticInputs,
    graph_metadata,
    poison_all,
    random_batch,
    reference_rows,
    replay,
)
from sglang.srt.layers.attention.nsa.metadata import (
    Extent,
    MetadataField,
    MetadataMode,
    NSAFlashMLAMetadata,
    NSAMetadata,
    fields_of,
)
from sglang.srt.layers.attention.nsa.metadata_check import MetadataMismatchError, check_metadata
from sglang.srt.layers.attention.nsa.paths import GraphMetadata
from sglang.srt.layers.attention.nsa.schedules import ReaderState


def live_elements(
    field: MetadataField, tensor: torch.Tensor, lengths: list[int], page: int
) -> list[tuple[int, ...]]:
    """Corners of a field's live part: first and last rows, first and last live columns."""
    if not field.is_table:
        return [(0,) * tensor.dim(), tuple(n - 1 for n in tensor.shape)]
    per = page if field.extent is Extent.PAGED_TABLE else 1
    live = [row for row, length in enumerate(lengths) if length > 0]
    return [(row, column) for row in (live[0], live[-1]) for column in {0, -(-lengths[row] // per) - 1}]


def flashmla_state(metadata: NSAMetadata) -> ReaderState:
    """Tensors of FlashMLA's shapes: what a library planned at capture and nobody may change."""
    like = metadata.cache_seqlens_int32
    parts = torch.arange(16, dtype=like.dtype, device=like.device).view(2, 8)
    splits = torch.arange(metadata.shape.rows + 1, dtype=like.dtype, device=like.device)
    return ReaderState(NSAFlashMLAMetadata(parts, splits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ["committed", "step"])
def test_each_field_of_each_backend(mode, rule, device):
    case = MetadataCase(mode, max_bs=5, backends=3, draft_seqlens=rule)
    inputs = StaticInputs(case, device)
    graph = graph_metadata(case, inputs, "replicate", prepare=flashmla_state)
    batch = random_batch(case, case.max_bs, random.Random(7))
    inputs.load(batch)
    poison_all(graph)
    replay(graph, case.max_bs, inputs.max_len(batch))
    graph.check(case.max_bs)

    corrupted = set()
    for index, (metadata, offset) in enumerate(zip(graph.backends[case.max_bs], case.offsets)):
        lengths = [length for _, length in reference_rows(mode, case.rows_per_req, batch, offset)]
        for field in fields_of(mode):
            tensor = field.of(metadata)
            if tensor is None:
                continue
            for at in live_elements(field, tensor, lengths, case.page_size):
                right = int(tensor[at])
                tensor[at] = right ^ 1
                with pytest.raises(MetadataMismatchError) as caught:
                    graph.check(case.max_bs)
                tensor[at] = right
                difference = caught.value.difference
                assert (difference.field, difference.backend) == (field.backend, index)
                assert (difference.row, difference.column) == (at[0], at[1] if len(at) == 2 else None)
                assert (difference.expected, difference.found) == (right, right ^ 1)
                words = [field.backend, f"backend {index}", f"row {at[0]}", str(right), str(right ^ 1)]
                words += [f"column {at[1]}"] if len(at) == 2 else []
                assert all(word in str(caught.value) for word in words)
                corrupted.add(field.backend)
    graph.check(case.max_bs)  # everything was put back
    assert corrupted == {field.backend for field in fields_of(mode)}


def test_dead_elements_may_hold_anything():
    case = MetadataCase(MetadataMode.DRAFT_EXTEND)
    inputs = StaticInputs(case)
    graph = graph_metadata(case, inputs)
    batch = random_batch(case, 4, random.Random(8)).padded(case.max_bs)
    inputs.load(batch)
    replay(graph, case.max_bs, inputs.max_len(batch))
    rows = reference_rows(case.mode, case.rows_per_req, batch, 0)
    for metadata in graph.backends[case.max_bs]:
        for row, (_, length) in enumerate(rows):
            metadata.page_table_1[row, length:] = -5
            metadata.real_page_table[row, -(-length // case.page_size) :] = -5
    graph.check(case.max_bs)


@pytest.mark.parametrize("layout", ["recompute", "replicate", "shared"])
def test_replay_verifies_itself_when_told_to(layout):
    """A path that leaves stale metadata: the replay itself raises, before anything reads it."""
    case = MetadataCase()
    inputs = StaticInputs(case)
    graph = graph_metadata(case, inputs, layout, check=True)
    first, second = (random_batch(case, case.max_bs, random.Random(seed)) for seed in (1, 2))
    inputs.load(first)
    replay(graph, case.max_bs, inputs.max_len(first))
    inputs.load(second)
    graph._launch[case.max_bs] = lambda max_len: None
    with pytest.raises(MetadataMismatchError, match="stale or wrong metadata: cache_seqlens_int32"):
        graph.replay(case.max_bs, inputs.max_len(second))


@pytest.mark.parametrize(
    "layout, copy", [("replicate", "fused"), ("replicate", "direct"), ("shared", "fused")]
)
@pytest.mark.parametrize("mode", MODES)
def test_a_page_in_pieces_is_found(mode, layout, copy):
    """Inputs that say `whole_pages` and are not: the slots that were taken for granted are compared."""
    case = MetadataCase(mode, page_size=16, whole_pages=True)
    inputs = StaticInputs(case)
    graph = graph_metadata(case, inputs, layout, copy, check=True)
    batch = replace(
        random_batch(case, case.max_bs, random.Random(1)), seq_lens=(40,) * 8, accept_lens=(2,) * 8
    )
    inputs.load(batch)
    graph.replay(case.max_bs, inputs.max_len(batch))
    inputs.req_to_token[batch.requests[2], 20] = 7
    row = 2 * case.shape.rows_per_req
    with pytest.raises(
        MetadataMismatchError, match=rf"page_table_1 of backend 0, row {row}, column 20: expected 7"
    ):
        graph.replay(case.max_bs, inputs.max_len(batch))


def test_without_verification_a_replay_compares_nothing(monkeypatch):
    case = MetadataCase()
    inputs = StaticInputs(case)
    graph = graph_metadata(case, inputs)
    monkeypatch.setattr(GraphMetadata, "check", lambda *_: pytest.fail("checked"))
    batch = random_batch(case, case.max_bs, random.Random(1))
    inputs.load(batch)
    replay(graph, case.max_bs, inputs.max_len(batch))


def test_mismatch_does_not_count_as_a_kernel_failure():
    """With 'auto', a wrong result must be raised, not hidden by a fallback to torch."""
    case = MetadataCase()
    inputs = StaticInputs(case)
    graph = graph_metadata(case, inputs, copy="auto", check=True)
    batch = random_batch(case, case.max_bs, random.Random(1))
    inputs.load(batch)
    graph._launch[case.max_bs] = lambda max_len: None
    with pytest.raises(MetadataMismatchError):
        graph.replay(case.max_bs, inputs.max_len(batch))
    assert graph.fallbacks == 0


def test_empty_batches_pass():
    case = MetadataCase(max_bs=0)
    inputs = StaticInputs(case)
    graph = graph_metadata(case, inputs)
    check_metadata(inputs.view(0), list(zip(graph.backends[0], case.offsets)), [None] * len(case.offsets))
