"""Every path and copy method leaves the same bits in every backend."""

from __future__ import annotations

import random
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from nsa_cases import (
    DEVICES,
    MODES,
    POISON,
    MetadataCase,
    StaticInputs,
    assert_live_equal,
    graph_metadata,
    poison_all,
    random_batch,
    reference_metadata,
    replay,
)
from sglang.benchmark_metadata.competitors import ALL_COPIERS, COMPETITORS, NEEDS_CUDA
from sglang.srt.layers.attention.nsa.metadata import (
    ALL_FIELDS,
    FIELDS,
    MetadataBuffers,
    MetadataMode,
    fields_of,
)
from sglang.srt.layers.attention.nsa.metadata_generators import TorchGenerator
from sglang.srt.layers.attention.nsa.paths import (
    PATHS,
    TORCH_METHODS,
    GraphMetadata,
    MetadataMethods,
    MetadataSelection,
)
from sglang.srt.layers.attention.nsa.replicate import COPIERS, Region
from sglang.srt.layers.attention.registry import IMPLEMENTATIONS

SHARING = ("shared", "in_graph", "indirect")
ROUTES = [("recompute", "torch"), *((layout, copy) for layout in SHARING for copy in ("torch", "fused"))]
ROUTES += [("replicate", copy) for copy in (*COPIERS, *COMPETITORS)]
CPU_COPIERS = [
    name for name, copier in {**COPIERS, **COMPETITORS}.items() if copier and name not in NEEDS_CUDA
]


def methods_for(layout: str, copy: str) -> MetadataMethods | None:
    """'torch' without the library's generation, so that no route depends on another's."""
    return TORCH_METHODS if copy == "torch" and layout != "replicate" else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout, copy", ROUTES)
def test_every_route_gives_the_same_bits(layout, copy, mode, device):
    if device == "cpu" and copy in NEEDS_CUDA:
        pytest.skip(f"{copy} needs CUDA; that it says so is another test")
    draft_seqlens = ("committed", "step") if mode is MetadataMode.DECODE else ("committed",)
    rng = random.Random(1)
    variants = product((1, 2, 3, 4, 5, 6, 7, 8, 17), draft_seqlens, (1, 64))
    for i, (backends, rule, page_size) in enumerate(variants):
        case = MetadataCase(
            mode,
            max_bs=6,
            backends=backends,
            page_size=page_size,
            draft_seqlens=rule,
            dtype=(torch.int32, torch.int64)[i % 2],
            whole_pages=i % 3 > 0,
        )
        inputs = StaticInputs(case, device)
        graph = graph_metadata(case, inputs, layout, copy, (2, 6), methods_for(layout, copy))
        for bs in (6, 2):
            batch = random_batch(case, bs, rng)
            inputs.load(batch)
            poison_all(graph)
            replay(graph, bs, inputs.max_len(batch))
            expected = {o: reference_metadata(case, inputs.table, batch, o) for o in set(case.offsets)}
            assert len(graph.backends[bs]) == backends
            for offset, metadata in zip(case.offsets, graph.backends[bs]):
                assert_live_equal(expected[offset], metadata)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout, copy", ROUTES)
def test_a_smaller_batch_touches_nothing_else(layout, copy, device):
    """A captured size writes only its own rows and its own part of the length vectors."""
    if device == "cpu" and copy in NEEDS_CUDA:
        pytest.skip(f"{copy} needs CUDA")
    for mode in MODES:
        case = MetadataCase(mode, max_bs=8)
        inputs = StaticInputs(case, device)
        graph = graph_metadata(case, inputs, layout, copy, (3,), methods_for(layout, copy))
        batch = random_batch(case, 3, random.Random(2))
        inputs.load(batch)
        poison_all(graph)
        replay(graph, 3, inputs.max_len(batch))
        for buffers in graph.buffers:
            whole, part = buffers.view(8), buffers.view(3)
            for field in fields_of(mode):
                tensor = field.of(whole)
                if tensor is not None:
                    assert (tensor[field.of(part).shape[0] :] == POISON).all(), field.backend


@pytest.mark.parametrize("copy", NEEDS_CUDA)
def test_methods_that_need_cuda_say_so(copy):
    case = MetadataCase()
    with pytest.raises((ValueError, ImportError), match=r"needs CUDA|triton"):
        graph_metadata(case, StaticInputs(case), "replicate", copy)


def test_unknown_copy_method_is_named():
    case = MetadataCase()
    with pytest.raises(ValueError, match="'warp'"):
        graph_metadata(case, StaticInputs(case), "replicate", "warp")


@pytest.mark.parametrize("copy", CPU_COPIERS)
def test_copies_of_hostile_regions(copy):
    """Strided sources and destinations, empty ones, bounded columns: nothing outside is written."""
    base = torch.arange(6 * 40, dtype=torch.int32).view(6, 40)
    regions, checks = [], []
    for src, cols_per in [
        (base[:, 3:37], 1),
        (base[::2, :20], 8),
        (base[:0], 1),
        (base[:, :0], 0),
        (base.view(-1)[5:16], 0),
        (base[0, :1], 0),
        (base[1:3, :33], 0),
    ]:
        shape = tuple(size + 3 for size in src.shape)
        dsts = tuple(torch.full(shape, POISON, dtype=torch.int32) for _ in range(3))
        regions.append(Region(src, dsts, cols_per))
        checks.append((src, dsts, cols_per))
    copier = ALL_COPIERS[copy](regions)
    for max_len in (0, 1, 9, 33, 34, -1):
        for _, dsts, _ in checks:
            for dst in dsts:
                dst.fill_(POISON)
        copier.run(max_len)
        for src, dsts, cols_per in checks:
            live = src
            if src.dim() == 2 and cols_per and max_len >= 0:
                live = src[:, : -(-max_len // cols_per)]
            for dst in dsts:
                want = torch.full_like(dst, POISON)
                want[tuple(slice(n) for n in live.shape)] = live
                assert torch.equal(dst, want), (max_len, src.shape, cols_per)


@pytest.mark.parametrize("copy", CPU_COPIERS)
def test_a_bound_beyond_the_tables_is_no_more_than_their_width(copy):
    case = MetadataCase()
    inputs = StaticInputs(case)
    graph = graph_metadata(case, inputs, "replicate", copy)
    batch = random_batch(case, case.max_bs, random.Random(4))
    inputs.load(batch)
    replay(graph, case.max_bs, 10 * case.width)
    graph.check(case.max_bs)


@pytest.mark.parametrize("layout", ["shared", "in_graph"])
@pytest.mark.parametrize("rule", ["committed", "step"])
def test_shared_layouts_hold_one_set_of_page_tables(layout, rule):
    case = MetadataCase(backends=7, draft_seqlens=rule)
    graph = graph_metadata(case, StaticInputs(case), layout)
    held, separate = graph.table_bytes
    assert separate == 7 * held
    tables = {metadata.page_table_1.data_ptr() for metadata in graph.backends[case.max_bs]}
    lengths = {metadata.cache_seqlens_int32.data_ptr() for metadata in graph.backends[case.max_bs]}
    assert len(tables) == 1
    assert len(lengths) == (1 if rule == "committed" else 7)


@pytest.mark.parametrize("rule", ["committed", "step"])
def test_indirect_holds_no_page_tables_and_nothing_that_nobody_reads(rule):
    reads = frozenset({"page_table_1", "nsa_seqlens_expanded", "nsa_cache_seqlens_int32"})
    for mode in MODES:
        case = MetadataCase(mode, backends=7, draft_seqlens=rule)
        inputs = StaticInputs(case)
        graph = graph_metadata(case, inputs, "indirect", reads=reads)
        held, separate = graph.table_bytes
        assert held == 0 < separate
        assert separate == graph_metadata(case, inputs, "recompute").table_bytes[0]
        batch = random_batch(case, case.max_bs, random.Random(6))
        inputs.load(batch)
        poison_all(graph)
        replay(graph, case.max_bs, -1)
        graph.check(case.max_bs)
        for offset, metadata in zip(case.offsets, graph.backends[case.max_bs]):
            there = {field.backend for field in FIELDS if field.of(metadata) is not None}
            same = (
                {"cache_seqlens_int32"} if mode is MetadataMode.DECODE else set()
            )  # as nsa_seqlens_expanded
            assert there == reads - {"page_table_1"} | same
            expected = reference_metadata(case, inputs.table, batch, offset)
            assert metadata.nsa_seqlens_expanded.tolist() == expected["seqlens_expanded"]
            assert metadata.nsa_cache_seqlens_int32.tolist() == expected["nsa_cache_seqlens"]
            slots = metadata.slot_table
            assert slots.slots is inputs.req_to_token  # and no copy of it
            assert slots.rows.data_ptr() == inputs.requests.data_ptr()


@pytest.mark.parametrize("copy", ["fused", "direct"])
@pytest.mark.parametrize("rule", ["committed", "step"])
def test_replicate_gives_every_backend_its_own_set(copy, rule):
    case = MetadataCase(backends=7, draft_seqlens=rule)
    graph = graph_metadata(case, StaticInputs(case), "replicate", copy)
    assert bool(graph.staging) == (copy == "fused")
    assert graph.table_bytes == (7 * graph.buffers[0].table_bytes,) * 2
    assert len({metadata.page_table_1.data_ptr() for metadata in graph.backends[case.max_bs]}) == 7


@pytest.mark.parametrize("layout", list(PATHS))
def test_no_backends_and_empty_batches_are_legal(layout):
    for case in (MetadataCase(backends=0), MetadataCase(max_bs=0), MetadataCase(max_bs=0, page_size=1)):
        inputs = StaticInputs(case)
        graph = graph_metadata(case, inputs, layout)
        replay(graph, case.max_bs, 0)
        replay(graph, case.max_bs, -1)
        if case.backends and not case.max_bs:
            graph.check(0)
            assert graph.backends[0][0].cu_seqlens_k.tolist() == [0]


@pytest.mark.parametrize("rule", ["committed", "step"])
def test_draft_rule_decides_what_each_backend_counts(rule):
    case = MetadataCase(backends=3, draft_seqlens=rule)
    inputs = StaticInputs(case)
    graph = graph_metadata(case, inputs, "replicate")
    batch = random_batch(case, case.max_bs, random.Random(0))
    inputs.load(batch)
    replay(graph, case.max_bs, inputs.max_len(batch))
    for i, metadata in enumerate(graph.backends[case.max_bs]):
        more = i + 1 if rule == "step" else 0
        assert metadata.cache_seqlens_int32.tolist() == [length + more for length in batch.seq_lens]


def test_flag_off_is_per_backend_computation_whatever_else_is_chosen():
    selection = MetadataSelection(enabled=False, layout="shared", copy="fused")
    case = MetadataCase()
    graph = GraphMetadata(selection, case.shape, case.offsets, torch.device("cpu"))
    assert selection.path == "recompute"
    assert graph.methods.generator is TorchGenerator
    assert len({id(buffers) for buffers in graph.buffers}) == case.backends


def test_page_tables_can_be_shared_under_other_lengths():
    case = MetadataCase()
    first = MetadataBuffers.create(case.shape, torch.device("cpu"))
    second = first.with_own_lengths()
    assert second.view(2).page_table_1.data_ptr() == first.view(2).page_table_1.data_ptr()
    assert second.view(2).cache_seqlens_int32.data_ptr() != first.view(2).cache_seqlens_int32.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["replicate", *SHARING])
def test_no_replay_waits_for_the_device(layout, mode):
    """Replays under torch's sync debug mode: any host read of device memory raises."""
    case = MetadataCase(mode, backends=7, draft_seqlens="step")
    inputs = StaticInputs(case, "cuda")
    graph = graph_metadata(case, inputs, layout)
    captured = torch.cuda.CUDAGraph()
    batch = random_batch(case, case.max_bs, random.Random(9))
    inputs.load(batch)
    graph.run_in_graph(case.max_bs)
    torch.cuda.synchronize()
    with torch.cuda.graph(captured):
        graph.run_in_graph(case.max_bs)
        inputs.seq_lens + 1  # a graph of nothing but metadata may be empty
    poison_all(graph)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph.replay(case.max_bs, inputs.max_len(batch))
        captured.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.check(case.max_bs)
    for offset, metadata in zip(case.offsets, graph.backends[case.max_bs]):
        assert_live_equal(reference_metadata(case, inputs.table, batch, offset), metadata)


HOST_LAUNCHED = [("shared", "auto"), ("replicate", "fused"), ("replicate", "direct")]


@pytest.mark.parametrize("layout, copy", HOST_LAUNCHED)
def test_a_replay_is_one_call_of_one_builtin(layout, copy):
    """Between the graph runner and the library's builtin stands nothing: each call of Python's costs as
    much as a twentieth of a launch."""
    case = MetadataCase(backends=7)
    graph = graph_metadata(case, StaticInputs(case), layout, copy)
    replay(graph, case.max_bs, 100)
    frames, builtins = [], []

    def count(frame, event, arg):
        if event == "call":
            frames.append(frame.f_code.co_name)
        elif event == "c_call" and arg is not sys.setprofile:
            builtins.append(arg.__name__)

    sys.setprofile(count)
    graph.replay(case.max_bs, 100)
    sys.setprofile(None)
    assert frames == ["replay"]
    assert builtins == ["metadata_replay"]


def test_the_documented_readers_are_the_declared_ones():
    """docs/metadata.md says who reads each field: what the implementations declare, and FIELDS' column."""
    page = (Path(__file__).parents[2] / "docs" / "metadata.md").read_text()
    for field in FIELDS:
        readers = [name for name, each in IMPLEMENTATIONS.items() if field.backend in each.reads]
        cell = "all" if len(readers) == len(IMPLEMENTATIONS) else ", ".join(readers) or "-"
        if field.backend == "page_table_1":
            cell += " (`indirect`: `req_to_token`)"
        assert f"| `{field.backend}` | {cell} | {field.sglang_reads} |" in page
    assert {name for each in IMPLEMENTATIONS.values() for name in each.reads} <= ALL_FIELDS
