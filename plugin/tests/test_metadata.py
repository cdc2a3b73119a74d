"""The plugin's metadata is SGLang's own, field by field, on SGLang's real classes."""

from __future__ import annotations

import random

import harness
import pytest
import torch
from sglang_nsa.hooks import draft_metadata_of
from sglang_nsa.real_classes import Sizes, StaticBuffers, build_wrapper, make_batch
from sglang_nsa.verification import difference

TOPK = 2048 if harness.ON_GPU else 64
CONTEXT = 4096 if harness.ON_GPU else 512
CAPTURED = (1, 2, 4, 8, 64)


def random_batch(installed, rng, bs, sizes):
    lengths = [rng.choice([1, 63, 64, 65, rng.randint(1, sizes.context_len)]) for _ in range(bs)]
    return make_batch(installed, lengths, rng.sample(range(1, sizes.pool), bs), harness.DEVICE)


def padded(batch, installed, bs):
    fill = bs - batch.batch_size
    return make_batch(
        installed,
        batch.seq_lens.tolist() + [1] * fill,
        batch.req_pool_indices.tolist() + [0] * fill,
        harness.DEVICE,
    )


class Reference:
    """SGLang's own path over N backends that the plugin never sees, padded and unpadded alike. On a GPU,
    where that path leaves derived fields of some backends behind, over one backend alone."""

    def __init__(self, installed, sizes, req_to_token, steps):
        self.installed, self.backends = installed, steps - 1
        self.wrapper = build_wrapper(installed, sizes, req_to_token, 2 if harness.ON_GPU else steps)
        installed.init_state(self.wrapper, max(CAPTURED), max(CAPTURED))
        for bs in CAPTURED:
            own = StaticBuffers(installed, bs, harness.DEVICE)  # up to 0.5.13 planning keeps the lengths
            installed.capture(self.wrapper, own.view(bs))

    def metadata(self, batch, bs):
        refresh = self.installed.refresh if harness.ON_GPU else self.installed.replay
        refresh(self.wrapper, padded(batch, self.installed, bs), bs)
        found = [backend.decode_cuda_graph_metadata[bs] for backend in self.wrapper.attn_backends]
        return found * self.backends if harness.ON_GPU else found


@pytest.mark.parametrize("page_size", [64, 1])
@pytest.mark.parametrize("steps", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("layout", ["shared", "replicate", "in_graph"])
def test_equals_sglang(plugin, monkeypatch, layout, steps, page_size):
    """Random batches, padded and not, in random order of captured sizes; one size captured twice."""
    installed = plugin(layout).installed
    harness.replace_constructor(monkeypatch, installed)
    sizes = Sizes(CONTEXT, page_size=page_size, topk=TOPK)
    model_runner = harness.model_runner(sizes)
    served = installed.wrapper_class(model_runner, 1, steps)
    runner = harness.Runner(installed, served, max(CAPTURED))
    for bs in (*CAPTURED, 4):
        runner.capture(bs)
    draft = draft_metadata_of(served)
    assert (draft.layout, draft.reason) == (layout, None)
    form = installed.form(served.attn_backends[0])
    reference = Reference(installed, sizes, model_runner.req_to_token, steps)
    rng = random.Random(steps)
    for _ in range(12):
        bs = rng.choice(CAPTURED)
        batch = random_batch(installed, rng, rng.randint(1 + bs // 2, bs) if bs > 1 else 1, sizes)
        runner.replay(batch, bs)
        if layout == "in_graph":
            draft._plans[bs].run()  # what the captured graph does
        for i, expected in enumerate(reference.metadata(batch, bs)):
            found = served.attn_backends[i].decode_cuda_graph_metadata[bs]
            assert difference(form, expected, found, i) is None
            assert served.attn_backends[i].forward_metadata is found
    assert draft.counters.generated == 12


def test_page_tables_are_held_once(plugin, monkeypatch):
    installed = plugin("shared").installed
    harness.replace_constructor(monkeypatch, installed)
    wrapper = installed.wrapper_class(harness.model_runner(Sizes(topk=TOPK)), 1, 8)
    harness.Runner(installed, wrapper, 8)
    tables = {b.decode_cuda_graph_metadata["page_table"].data_ptr() for b in wrapper.attn_backends}
    assert len(tables) == 1


def test_every_wrapper_has_state_of_its_own(plugin, monkeypatch):
    """Adaptive speculation: one wrapper for each number of steps, one of them without backends."""
    installed = plugin("shared").installed
    harness.replace_constructor(monkeypatch, installed)
    model_runner = harness.model_runner(Sizes(topk=TOPK))
    wrappers = {steps: installed.wrapper_class(model_runner, 1, steps) for steps in (1, 3, 6)}
    assert draft_metadata_of(wrappers[1]) is None
    runners = {steps: harness.Runner(installed, wrappers[steps], 4) for steps in (3, 6)}
    for runner in runners.values():
        runner.capture(4)
    batches = {3: [5, 6, 7, 8], 6: [300, 200, 100, 50]}
    for steps, lengths in batches.items():
        runners[steps].replay(make_batch(installed, lengths, [1, 2, 3, 4]), 4)
    for steps, lengths in batches.items():
        for backend in wrappers[steps].attn_backends:
            found = backend.decode_cuda_graph_metadata[4].cache_seqlens_int32
            assert torch.equal(found, torch.tensor(lengths, dtype=torch.int32))
