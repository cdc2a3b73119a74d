"""Metadata that follows from the lengths is fresh in every backend."""

from __future__ import annotations

import harness
import pytest
import torch
from sglang_nsa.hooks import draft_metadata_of
from sglang_nsa.nsa.schedules import paged_mqa_logits_schedule
from sglang_nsa.real_classes import Sizes, make_batch

CONTEXT, BS = 3000, 4


def served_runner(plugin, monkeypatch, layout, steps, decode="flashmla_sparse", **flags):
    installed = plugin(layout, **flags).installed
    harness.replace_constructor(monkeypatch, installed)
    harness.replace_deep_gemm(monkeypatch, installed)
    harness.replace_flashmla(monkeypatch, installed)
    sizes = Sizes(context_len=CONTEXT, topk=2048 if harness.ON_GPU else 64, decode=decode)
    return harness.Runner(installed, installed.wrapper_class(harness.model_runner(sizes), 1, steps), 8)


def schedules(runner, bs):
    return [
        b.decode_cuda_graph_metadata[bs].paged_mqa_schedule_metadata for b in runner.wrapper.attn_backends
    ]


LENGTHS = [1500, 3, 2900, 700]
FRESH = paged_mqa_logits_schedule(torch.tensor(LENGTHS, dtype=torch.int32), harness.NUM_SMS)


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("layout", ["shared", "replicate", "in_graph"])
def test_schedule_is_fresh(plugin, monkeypatch, layout, steps):
    runner = served_runner(plugin, monkeypatch, layout, steps)
    draft = draft_metadata_of(runner.wrapper)
    runner.capture(BS)
    assert draft.reason is None and draft.layout == layout
    runner.replay(make_batch(runner.installed, LENGTHS, [4, 1, 3, 2]), BS)
    if layout == "in_graph":
        draft._plans[BS].run()
    for schedule in schedules(runner, BS):
        assert torch.equal(schedule, FRESH)


def test_sglang_leaves_three_backends_stale(plugin, monkeypatch):
    """The defect that the plugin mends: SGLang's path at N = 3 refreshes no schedule, N = 4 only the last (up
    to 0.5.11 not even that)."""
    import sglang_nsa.sgl_kernel as library

    for steps in (4, 5):
        runner = served_runner(plugin, monkeypatch, "replicate", steps, SGLANG_NSA_PLUGIN_ALTERNATE=100)
        harness.replace_fused_copy(monkeypatch, library)
        runner.capture(BS)
        runner.replay(make_batch(runner.installed, LENGTHS, [4, 1, 3, 2]), BS)  # SGLang's turn
        fresh = [torch.equal(schedule, FRESH) for schedule in schedules(runner, BS)]
        assert not any(fresh[:3])


@pytest.mark.parametrize("layout", ["shared", "replicate"])
def test_another_deep_gemm_computes_its_own_schedule(plugin, monkeypatch, layout):
    runner = served_runner(plugin, monkeypatch, layout, 4)

    def reversed_schedule(lens, block, sms):
        return paged_mqa_logits_schedule(lens.flip(0), sms)

    import deep_gemm

    monkeypatch.setattr(deep_gemm, "get_paged_mqa_logits_metadata", reversed_schedule)
    module = runner.installed.module
    if hasattr(module, "resolve_paged_mqa_logits_metadata_fn"):
        monkeypatch.setattr(module, "resolve_paged_mqa_logits_metadata_fn", lambda: reversed_schedule)
    runner.capture(BS)
    runner.replay(make_batch(runner.installed, LENGTHS, [4, 1, 3, 2]), BS)
    expected = paged_mqa_logits_schedule(torch.tensor(LENGTHS[::-1], dtype=torch.int32), harness.NUM_SMS)
    for schedule in schedules(runner, BS):
        assert torch.equal(schedule, expected)


@pytest.mark.parametrize("layout", ["shared", "replicate", "in_graph"])
def test_flashmla_tiles_of_each_size_stay(plugin, monkeypatch, layout):
    """SGLang has one buffer of tiles for all sizes: a replay of one size must not read those of another."""
    runner = served_runner(plugin, monkeypatch, layout, 4, decode="flashmla_kv")
    for bs in (2, BS, 8):
        runner.capture(bs)
    for bs in (8, 2, BS):
        lengths = (LENGTHS * 2)[:bs]
        runner.replay(make_batch(runner.installed, lengths, range(1, bs + 1)), bs)
        if layout == "in_graph":
            draft_metadata_of(runner.wrapper)._plans[bs].run()
        for backend in runner.wrapper.attn_backends:
            tiles = backend.forward_metadata.flashmla_metadata
            expected = backend._compute_flashmla_metadata(torch.ones(bs), 1)
            assert torch.equal(tiles.flashmla_metadata, expected.flashmla_metadata)
            assert torch.equal(tiles.num_splits, expected.num_splits)
