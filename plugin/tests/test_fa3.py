"""FlashAttention's draft backends: the plugin's metadata is what SGLang's own kernels write, for every step.

SGLang's kernels are Triton's; here they run in its interpreter.
"""

from __future__ import annotations

import copy
import functools
import json
import random
from types import SimpleNamespace

import harness
import pytest
import torch
from sglang_nsa.family import find_installed
from sglang_nsa.fields import FA3
from sglang_nsa.hooks import draft_metadata_of
from sglang_nsa.nsa.metadata_check import MetadataMismatchError
from sglang_nsa.own_path import Shadow
from sglang_nsa.real_classes import Sizes, StaticBuffers, build_wrapper, make_batch, token_table
from sglang_nsa.verification import difference

LAYOUTS = ("shared", "replicate", "in_graph")
VECTORS = ("cache_seqlens_int32", "cu_seqlens_k")


def served(plugin, monkeypatch, layout="shared", steps=4, sizes=Sizes(page_size=16), **flags):  # noqa: B008
    installed = plugin(layout, kind="fa3", **flags).installed
    harness.replace_constructor(monkeypatch, installed)
    wrapper = installed.wrapper_class(harness.model_runner(sizes), 1, steps)
    return harness.Runner(installed, wrapper, 64)


def batch_of(installed, lengths, requests):
    return make_batch(installed, lengths, requests, harness.DEVICE)


def random_batch(runner, rng, raw, longest):
    lengths = [rng.choice([1, 15, 16, 17, rng.randint(1, longest)]) for _ in range(raw)]
    return batch_of(runner.installed, lengths, rng.sample(range(1, 80), raw))


class Reference:
    """SGLang's own path over N backends that the plugin never sees."""

    def __init__(self, installed, sizes, steps, captured):
        self.installed = installed
        self.wrapper = build_wrapper(installed, sizes, token_table(sizes, harness.DEVICE), steps)
        self.buffers = StaticBuffers(installed, max(captured), harness.DEVICE)
        installed.init_state(self.wrapper, max(captured), max(captured))
        for bs in captured:
            installed.capture(self.wrapper, self.buffers.view(bs))

    def sets(self, batch, bs):
        """A copy of each backend's metadata."""
        self.installed.replay(self.wrapper, self.buffers.set(batch, bs), bs)
        return [
            copy.deepcopy(backend.decode_cuda_graph_metadata[bs]) for backend in self.wrapper.attn_backends
        ]


@functools.cache
def expected_sets(sizes, steps, order):
    """(lengths, requests, captured size, metadata) for random batches, padded and not. The interpreter is
    slow, so what all layouts are compared with is computed once."""
    installed = find_installed("fa3")
    reference = Reference(installed, sizes, steps, sorted(set(order)))
    rng = random.Random(steps)
    found = []
    for bs in order:
        raw = rng.randint(1 + bs // 2, bs)
        longest = sizes.context_len - steps
        lengths = [rng.choice([1, 15, 16, 17, rng.randint(1, longest)]) for _ in range(raw)]
        requests = rng.sample(range(1, sizes.pool), raw)
        found.append(
            (
                lengths,
                requests,
                bs,
                reference.sets(batch_of(installed, lengths, requests), bs),
            )
        )
    return found


def require_equal(runner, sizes, layout, steps, order):
    draft = draft_metadata_of(runner.wrapper)
    assert (draft.layout, draft.reason) == (layout, None)
    for bs in sorted(set(order)):
        runner.capture(bs)
    runner.capture(min(order))  # again
    for lengths, requests, bs, expected in expected_sets(sizes, steps, order):
        runner.replay(batch_of(runner.installed, lengths, requests), bs)
        runner.run_graph(bs)
        for i, backend in enumerate(runner.wrapper.attn_backends):
            found = backend.decode_cuda_graph_metadata[bs]
            assert difference(draft.form, expected[i], found, i) is None
            for name in VECTORS:  # bit for bit, and not only what the comparison above looks at
                assert torch.equal(getattr(expected[i], name), getattr(found, name))
            assert backend.forward_metadata is found
    assert draft.counters.generated == len(order)


DEPTHS = ((2, 1), (3, 16), (4, 1), (5, 16), (6, 1), (7, 16), (8, 64))  # steps, page size


@pytest.mark.parametrize(
    "layout, steps, page_size",
    [(layout, *depth) for layout in LAYOUTS for depth in (DEPTHS if layout == "shared" else DEPTHS[::3])],
)
def test_equals_sglang(plugin, monkeypatch, layout, steps, page_size):
    """Random batches, padded and not, in random order of captured sizes; one size captured twice."""
    sizes = Sizes(page_size=page_size, context_len=200)
    runner = served(plugin, monkeypatch, layout, steps, sizes)
    require_equal(runner, sizes, layout, steps, (3, 1, 8, 3, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_sglang_for_many_requests(plugin, monkeypatch, layout):
    sizes = Sizes(context_len=200)
    runner = served(plugin, monkeypatch, layout, 3, sizes)
    require_equal(runner, sizes, layout, 3, (64, 2, 64))


def test_comparison_sees_every_field(plugin, monkeypatch):
    """The live part of each field: no test above could fail otherwise."""
    runner = served(plugin, monkeypatch, "replicate")
    runner.capture(3)
    batch = batch_of(runner.installed, [5, 40, 17], [1, 2, 3])
    runner.replay(batch, 3)
    form = draft_metadata_of(runner.wrapper).form
    found = runner.wrapper.attn_backends[1].decode_cuda_graph_metadata[3]
    expected = Reference(runner.installed, Sizes(page_size=16), 4, (3,)).sets(batch, 3)[1]
    for name in FA3.generated.values():
        tensor = getattr(found, name)
        tensor.view(-1)[0] += 1
        assert difference(form, expected, found, 1).field == name
        tensor.view(-1)[0] -= 1
    assert difference(form, expected, found, 1) is None


def test_tables_are_held_once_and_lengths_by_step(plugin, monkeypatch):
    runner = served(plugin, monkeypatch, "shared", steps=8)
    runner.capture(8)
    runner.replay(batch_of(runner.installed, list(range(20, 28)), list(range(1, 9))), 8)
    sets = [backend.decode_cuda_graph_metadata[8] for backend in runner.wrapper.attn_backends]
    assert len({metadata.page_table.data_ptr() for metadata in sets}) == 1
    for name in VECTORS:
        assert len({getattr(metadata, name).data_ptr() for metadata in sets}) == 7
    for step, metadata in enumerate(sets):
        assert metadata.cache_seqlens_int32.tolist() == [n + step + 1 for n in range(20, 28)]


def test_replicate_keeps_sglangs_tables(plugin, monkeypatch):
    runner = served(plugin, monkeypatch, "replicate", steps=8)
    runner.capture(8)
    sets = [backend.decode_cuda_graph_metadata[8] for backend in runner.wrapper.attn_backends]
    assert len({metadata.page_table.data_ptr() for metadata in sets}) == 7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verification_finds_no_difference(plugin, monkeypatch, layout):
    runner = served(plugin, monkeypatch, layout, SGLANG_NSA_VERIFY_METADATA=1)
    for bs in (1, 3, 8):
        runner.capture(bs)
    rng = random.Random(1)
    for bs in (8, 3, 8, 1):
        runner.replay(random_batch(runner, rng, rng.randint(1 + bs // 2, bs), 500), bs)
        runner.run_graph(bs)
    draft = draft_metadata_of(runner.wrapper)
    assert draft.counters.verified == (3 if layout == "in_graph" else 4)  # the graph of the last is to come


@pytest.mark.parametrize("backend", [0, 2])
@pytest.mark.parametrize("field", FA3.generated.values())
def test_verification_names_a_difference(plugin, monkeypatch, field, backend):
    runner = served(plugin, monkeypatch, "replicate", SGLANG_NSA_VERIFY_METADATA=1)
    runner.capture(3)
    draft = draft_metadata_of(runner.wrapper)
    generate = draft._launches[3]

    def corrupt():
        generate()
        getattr(runner.wrapper.attn_backends[backend].decode_cuda_graph_metadata[3], field).view(-1)[0] += 1

    draft._launches[3] = corrupt
    with pytest.raises(MetadataMismatchError, match=rf"{field} of backend {backend}, row 0"):
        runner.replay(batch_of(runner.installed, [5, 40, 17], [1, 2, 3]), 3)


LEFT_ALONE = {
    "use_sliding_window_kv_pool": True,
    "is_prefill_aware_swa": True,
    "has_local_attention": True,
    "is_encoder_decoder": True,
    "_unified_dense": True,
    "kv_index_translator": SimpleNamespace(is_translating=True),
    "_kv_shard_pool": object(),
    "topk": 4,
    "speculative_step_id": 5,
}


@pytest.mark.parametrize("attribute, value", LEFT_ALONE.items(), ids=LEFT_ALONE)
def test_what_is_left_to_sglang(plugin, monkeypatch, attribute, value):
    """Decided before SGLang's own methods run even once."""
    installed = plugin(kind="fa3").installed
    harness.replace_constructor(monkeypatch, installed)
    wrapper = installed.wrapper_class(harness.model_runner(Sizes(page_size=16)), 1, 4)
    for backend in wrapper.attn_backends:
        setattr(backend, attribute, value)
    calls = []
    monkeypatch.setattr(installed.backend_class, "init_cuda_graph_state", lambda *sizes: calls.append(sizes))
    wrapper.init_cuda_graph_state(8, 8)
    draft = draft_metadata_of(wrapper)
    assert draft.layout is None and draft.reason
    assert [call[1:] for call in calls] == [(8, 8)] * 3  # SGLang's own, for each backend


def test_strict_stops_such_a_server(plugin, monkeypatch):
    with pytest.raises(SystemExit, match="sliding window"):
        strict = {"SGLANG_NSA_PLUGIN_STRICT": "1"}
        installed = plugin(kind="fa3", **strict).installed
        harness.replace_constructor(monkeypatch, installed)
        wrapper = installed.wrapper_class(harness.model_runner(Sizes()), 1, 4)
        wrapper.attn_backends[2].use_sliding_window_kv_pool = True
        wrapper.init_cuda_graph_state(8, 8)


def test_another_computation_of_sglangs_is_left_alone(plugin, monkeypatch):
    """The day a release gives the steps other lengths, the trial sees it."""
    installed = plugin(kind="fa3").installed
    harness.replace_constructor(monkeypatch, installed)
    wrapper = installed.wrapper_class(harness.model_runner(Sizes(page_size=16)), 1, 4)
    own = Shadow.replay

    def another(shadow, batch, bs):
        own(shadow, batch, bs)
        shadow.metadata(1, bs).cache_seqlens_int32.add_(1)

    monkeypatch.setattr(Shadow, "replay", another)
    wrapper.init_cuda_graph_state(8, 8)
    assert "cache_seqlens_int32 of backend 1" in draft_metadata_of(wrapper).reason


def test_missing_library_leaves_sglang_alone(plugin, monkeypatch):
    """Without the kernel nothing is gained: SGLang keeps its own buffers and launches."""

    def missing(device_type):
        raise ImportError("no library here")

    monkeypatch.setattr("sglang_nsa.nsa.metadata_generators.load_kernels", missing)
    runner = served(plugin, monkeypatch)
    draft = draft_metadata_of(runner.wrapper)
    assert (draft.layout, draft.reason) == (None, "no library here")
    runner.capture(3)
    runner.replay(batch_of(runner.installed, [5, 40, 17], [1, 2, 3]), 3)
    for step, backend in enumerate(runner.wrapper.attn_backends):
        lengths = backend.decode_cuda_graph_metadata[3].cache_seqlens_int32
        assert lengths.tolist() == [6 + step, 41 + step, 18 + step]


def test_inputs_that_are_not_in_the_buffers_fall_back(plugin, monkeypatch, caplog):
    runner = served(plugin, monkeypatch)
    runner.capture(3)
    monkeypatch.setattr(runner.buffers, "set", lambda batch, bs: batch)
    runner.replay(batch_of(runner.installed, [5, 40, 17], [1, 2, 3]), 3)
    for step, backend in enumerate(runner.wrapper.attn_backends):
        lengths = backend.decode_cuda_graph_metadata[3].cache_seqlens_int32
        assert lengths.tolist() == [6 + step, 41 + step, 18 + step]
    assert "buffers do not hold the batch" in caplog.text


def test_a_graph_without_the_plan_is_served_before_its_replay(plugin, monkeypatch, caplog):
    """in_graph, but the draft worker's captured function begins where no hook is: else it would read what
    it was captured with, for ever."""
    runner = served(plugin, monkeypatch, "in_graph")
    monkeypatch.setattr(runner, "begin_graph", lambda bs: None)
    runner.capture(3)
    runner.replay(batch_of(runner.installed, [5, 40, 17], [1, 2, 3]), 3)
    for step, backend in enumerate(runner.wrapper.attn_backends):
        lengths = backend.decode_cuda_graph_metadata[3].cache_seqlens_int32
        assert lengths.tolist() == [6 + step, 41 + step, 18 + step]
    assert "does not write its metadata" in caplog.text


def test_alternation_measures_both_paths(plugin, monkeypatch):
    runner = served(plugin, monkeypatch, SGLANG_NSA_PLUGIN_ALTERNATE=10)
    runner.capture(3)
    for _ in range(40):
        runner.replay(batch_of(runner.installed, [5, 40, 17], [4, 1, 3]), 3)
    (row,) = draft_metadata_of(runner.wrapper)._alternation.table()
    assert row["bs"] == 3 and row["host_sglang_n"] > 0 and row["host_plugin_n"] > 0


@pytest.mark.parametrize("kind", ["nsa", "fa3"])
def test_one_kind_alone(plugin, kind):
    other = {"nsa": "fa3", "fa3": "nsa"}[kind]
    assert plugin(kind=other, SGLANG_NSA_PLUGIN_BACKENDS=kind) is None
    assert plugin(kind=kind, SGLANG_NSA_PLUGIN_BACKENDS=kind).not_applied() == []


def test_doctor_says_what_would_happen(plugin, capsys, monkeypatch):
    from sglang_nsa.__main__ import main

    monkeypatch.setenv("SGLANG_NSA_PLUGIN_BACKENDS", "fa3")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "FlashAttentionMultiStepBackend" in said and "one launch of the plugin" in said


@pytest.mark.parametrize("kind", ["nsa", "fa3"])
def test_bench_compares_and_times(plugin, capsys, monkeypatch, tmp_path, kind):
    from sglang_nsa import bench
    from sglang_nsa.__main__ import main

    monkeypatch.setattr(bench, "CALLS", 2)
    out = tmp_path / "rows.json"
    sizes = ["--steps", "3", "--bs", "1", "2", "--context-len", "64"]
    assert main(["bench", "--backend", kind, *sizes, "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("shared") == 2
    rows = json.loads(out.read_text())
    assert {row["path"] for row in rows} == {"sglang", *LAYOUTS}
    assert {row["backend"] for row in rows} == {kind}
