"""What of SGLang meets the draft metadata without being the plugin's: pooled keys, HiSparse, memory saver."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import random
from types import SimpleNamespace

import harness
import pytest
import torch
from sglang_nsa.hooks import draft_metadata_of
from sglang_nsa.real_classes import Sizes, StaticBuffers, build_wrapper, make_batch
from sglang_nsa.verification import difference

SIZES = Sizes(context_len=700, topk=64)
CAPTURED = (2, 4)
STEPS = 4
LAYOUTS = ["shared", "replicate", "in_graph"]


class Pair:
    """A served wrapper and SGLang's own over N backends, with `prepare` applied to each backend."""

    def __init__(self, plugin, monkeypatch, layout, prepare, sizes=SIZES, **flags):
        self.installed = plugin(layout, **flags).installed
        harness.replace_constructor(monkeypatch, self.installed)
        model_runner = harness.model_runner(sizes)
        self.served = self.installed.wrapper_class(model_runner, 1, STEPS)
        self.own = build_wrapper(self.installed, sizes, model_runner.req_to_token, STEPS)
        for backend in (*self.served.attn_backends, *self.own.attn_backends):
            prepare(backend)
        self.runner = harness.Runner(self.installed, self.served, max(CAPTURED))
        self.draft = draft_metadata_of(self.served)
        self.installed.init_state(self.own, max(CAPTURED), max(CAPTURED))
        for bs in CAPTURED:
            self.runner.capture(bs)
            self.installed.capture(self.own, StaticBuffers(self.installed, bs, harness.DEVICE).view(bs))

    def replay(self, bs, rng):
        lengths = [rng.choice([1, 63, 64, 65, rng.randint(1, SIZES.context_len)]) for _ in range(bs)]
        batch = make_batch(self.installed, lengths, rng.sample(range(1, SIZES.pool), bs))
        self.runner.replay(batch, bs)
        plan = self.draft._plans.get(bs)
        if self.draft.layout == "in_graph" and plan is not None:
            plan.run()
        self.installed.replay(self.own, batch, bs)

    def differences(self, bs):
        form = self.installed.form(self.own.attn_backends[0])
        pairs = zip(self.own.attn_backends, self.served.attn_backends, strict=True)
        for i, pair in enumerate(pairs):
            expected, found = (backend.decode_cuda_graph_metadata[bs] for backend in pair)
            yield difference(form, expected, found, i)


def replay_and_compare(pair, count):
    rng = random.Random(0)
    for _ in range(count):
        bs = rng.choice(CAPTURED)
        pair.replay(bs, rng)
        assert not [wrong for wrong in pair.differences(bs) if wrong]


def pooled(monkeypatch):
    """KPool on CPU tensors: SGLang's own functions, with what its GPU kernel computes in plain torch."""
    try:
        plan = importlib.import_module("sglang.srt.layers.attention.dsa.kpool_plan")
    except ModuleNotFoundError:
        pytest.skip("this release has no pooled keys")

    def write_plan(*, write_start, req_pool_indices, real_page_table, req_out, write_start_out, **rest):
        rows = req_pool_indices.shape[0]
        kpool = rest["kpool"] if "kpool" in rest else rest["pool_size"]  # its name in 0.5.20 and 0.5.21
        req_out[:rows] = req_pool_indices
        write_start_out[:rows] = write_start
        rest["tail_logical_start_out"][:rows] = write_start.to(torch.int32) // kpool * kpool
        page = real_page_table.long().gather(1, (write_start.long() // 64).unsqueeze(1))
        rest["write_loc_out"][:rows] = page * 64 + (write_start % 64).unsqueeze(1)

    monkeypatch.setattr(plan, "is_cuda", lambda: True)
    monkeypatch.setattr(plan, "update_kpool_write_plan_cuda_graph", write_plan)

    def prepare(backend):
        backend.dsa_index_kpool = 4
        backend.token_to_kv_pool = SimpleNamespace(index_page_size=64, slots_per_page=64)

    return prepare


@pytest.mark.parametrize("verify", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooled_keys_are_refreshed_by_sglang(plugin, monkeypatch, layout, verify):
    """With pooled keys the backends share, and SGLang's own method brings the shared set up to date."""
    pair = Pair(plugin, monkeypatch, layout, pooled(monkeypatch), SGLANG_NSA_VERIFY_METADATA=verify)
    assert pair.draft.layout == ("replicate" if layout == "replicate" else "shared")
    assert "kpool_write_plan" in pair.draft.reason and "pooled_real_page_table" in pair.draft.reason
    replay_and_compare(pair, 8)
    assert (pair.draft.counters.own_refreshes, pair.draft.counters.generated) == (8, 0)
    assert pair.draft.counters.verified == 8 * verify


def test_stale_pooled_keys_are_found(plugin, monkeypatch):
    pair = Pair(plugin, monkeypatch, "replicate", pooled(monkeypatch))
    pair.replay(4, random.Random(0))
    pair.served.attn_backends[2].decode_cuda_graph_metadata[4].kpool_write_plan.write_loc[1] += 1
    assert [wrong and wrong.field for wrong in pair.differences(4)] == [
        None, None, "kpool_write_plan.write_loc"
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_page_tables_under_hisparse(plugin, monkeypatch, layout):
    """HiSparse translates what it reads in the table of single tokens: its live part is always written."""

    def prepare(backend):
        backend.hisparse_coordinator = SimpleNamespace()

    pair = Pair(plugin, monkeypatch, layout, prepare)
    assert (pair.draft.layout, pair.draft.reason) == (layout, None)
    replay_and_compare(pair, 10)


class Saver:
    """SGLang's adapter of the memory saver, as far as the graph state uses it."""

    def __init__(self):
        self.inside = False

    @contextlib.contextmanager
    def region(self, *args, **kwargs):
        self.inside = True
        yield
        self.inside = False


@pytest.mark.parametrize("decode", ["flashmla_sparse", "flashmla_kv"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_graph_state_comes_back_as_zeros(plugin, monkeypatch, layout, decode):
    """After a sleep page tables and FlashMLA's buffers are zeros: every replay writes all that is read."""
    from sglang_nsa.generation import Generation

    saver = Saver()
    harness.replace_flashmla(monkeypatch, plugin(layout).installed)
    init = Generation.__init__

    def outside(self, *args, **kwargs):
        assert not saver.inside  # a plan of ours must not be released with the tables
        init(self, *args, **kwargs)

    monkeypatch.setattr(Generation, "__init__", outside)

    def prepare(backend):
        backend._memory_saver_adapter = saver

    pair = Pair(plugin, monkeypatch, layout, prepare, dataclasses.replace(SIZES, decode=decode))
    assert pair.draft.reason is None
    replay_and_compare(pair, 3)
    for backend in pair.served.attn_backends:
        state = backend.decode_cuda_graph_metadata
        flashmla = state.get("flashmla_metadata")
        released = [state["page_table"], state.get("real_page_table")]
        if flashmla is not None:
            released += [flashmla.flashmla_metadata, flashmla.num_splits]
        for tensor in released:
            if tensor is not None:
                tensor.zero_()
    replay_and_compare(pair, 6)
