"""The plugin's metadata is SGLang's own, field by field, on SGLang's real classes."""

from __future__ import annotations

import random

import pytest
import real_classes
import torch
from sglang_nsa.verification import difference

TOPK = 64


def seq_lens_dtype(installed):
    return torch.int32 if installed.family.prefix == "nsa" else torch.int64


def random_batch(installed, rng, bs, context=500, pool=80):
    lengths = [rng.choice([1, 63, 64, 65, rng.randint(1, context)]) for _ in range(bs)]
    return real_classes.batch(installed, lengths, rng.sample(range(1, pool), bs))


def own_wrapper(installed, runner, steps):
    """A wrapper that the plugin does not serve."""
    wrapper = installed.wrapper_class.__new__(installed.wrapper_class)
    installed.construct(wrapper, runner, 1, steps)
    return wrapper


@pytest.mark.parametrize("page_size", [64, 1])
@pytest.mark.parametrize("steps", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("layout", ["shared", "replicate", "in_graph"])
def test_equals_sglang(plugin, monkeypatch, layout, steps, page_size):
    installed = plugin(layout).installed
    real_classes.replace_constructor(monkeypatch, installed, topk=TOPK)
    runner = real_classes.model_runner(page_size=page_size)
    served = installed.wrapper_class(runner, 1, steps)
    assert draft(served) is not None
    own = own_wrapper(installed, runner, steps)
    sizes = [1, 2, 4, 8, 64]
    ours_runner = real_classes.Runner(installed, served, max(sizes), seq_lens_dtype(installed))
    for bs in sizes:
        ours_runner.capture(bs)
    assert draft(served).layout == layout, draft(served).reason
    assert draft(served).reason is None
    rng = random.Random(steps)
    max_bs = max(sizes)
    own_seq = torch.ones(max_bs, dtype=seq_lens_dtype(installed))
    installed.init_state(own, max_bs, max_bs)
    for bs in sizes:
        installed.capture(
            own, real_classes.batch(installed, own_seq[:bs].clone(), torch.zeros(bs, dtype=torch.int64))
        )
    for _ in range(12):
        bs = rng.choice(sizes)
        raw = rng.randint(1 + bs // 2, bs) if bs > 1 else 1
        batch = random_batch(installed, rng, raw)
        ours_runner.replay(batch, bs)
        if layout == "in_graph":
            draft(served)._plans[bs].run()  # what the captured graph does
        padded = real_classes.batch(
            installed,
            torch.cat([batch.seq_lens, torch.ones(bs - raw, dtype=batch.seq_lens.dtype)]),
            torch.cat([batch.req_pool_indices, torch.zeros(bs - raw, dtype=torch.int64)]),
        )
        installed.replay(own, padded, bs)
        for i in range(steps - 1):
            expected = own.attn_backends[i].decode_cuda_graph_metadata[bs]
            found = served.attn_backends[i].decode_cuda_graph_metadata[bs]
            assert difference(expected, found, installed.family.prefix, TOPK, i) is None
            assert served.attn_backends[i].forward_metadata is found
    assert draft(served).counters.generated == 12


def draft(wrapper):
    from sglang_nsa.hooks import draft_metadata_of

    return draft_metadata_of(wrapper)
