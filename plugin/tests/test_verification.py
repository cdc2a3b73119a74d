"""SGLANG_NSA_VERIFY_METADATA=1: every replay against SGLang's own computation."""

from __future__ import annotations

import random

import harness
import pytest
import test_derived
import torch
from sglang_nsa.hooks import draft_metadata_of
from sglang_nsa.nsa.metadata_check import MetadataMismatchError
from sglang_nsa.real_classes import Sizes, make_batch, slot_allocator


def run(runner, replays, layout, sizes=(1, 4, 8)):
    draft = draft_metadata_of(runner.wrapper)
    rng = random.Random(0)
    for _ in range(replays):
        bs = rng.choice(sizes)
        raw = rng.randint(max(1, bs - 2), bs)
        lengths = [rng.randint(1, test_derived.CONTEXT) for _ in range(raw)]
        batch = make_batch(runner.installed, lengths, rng.sample(range(1, 80), raw), harness.DEVICE)
        runner.replay(batch, bs)
        if layout == "in_graph":
            draft._plans[bs].run()


@pytest.mark.parametrize("decode", ["flashmla_sparse", "flashmla_kv"])
@pytest.mark.parametrize("layout", ["shared", "replicate", "in_graph"])
def test_no_difference(plugin, monkeypatch, layout, decode):
    runner = test_derived.served_runner(plugin, monkeypatch, layout, 4, decode, SGLANG_NSA_VERIFY_METADATA=1)
    for bs in (1, 4, 8):
        runner.capture(bs)
    run(runner, 20, layout)
    draft = draft_metadata_of(runner.wrapper)
    assert draft.counters.verified == (19 if layout == "in_graph" else 20)  # the graph of the last is to come
    assert draft.counters.generated == 20


def test_sglangs_allocator_gives_whole_pages(plugin):
    """Requests that grow by prompts and by chains of drafts, end, and leave their pages to others."""
    plugin("shared")
    rng, pages, page_size = random.Random(3), 40, 64
    allocator = slot_allocator(Sizes(pool=pages, page_size=page_size), harness.DEVICE)
    table = torch.zeros(6, pages * page_size, dtype=torch.int64, device=harness.DEVICE)
    lens = [0] * len(table)
    in_page = torch.arange(table.shape[1], device=harness.DEVICE) % page_size
    for _ in range(25):
        rows = rng.sample(range(len(table)), 3)
        added = [rng.choice([1, 4, 63, 64, 65, rng.randint(1, 150)]) for _ in rows]
        if sum(lens) + sum(added) + len(table) * page_size > pages * page_size:
            allocator.free(table[rows[0], : lens[rows[0]]])
            lens[rows[0]] = 0
            continue
        before, after = (torch.tensor([lens[r] + n for r, n in zip(rows, more)]) for more in ([0] * 3, added))
        last = torch.stack([table[r, lens[r] - 1] if lens[r] else in_page[0] - 1 for r in rows])
        given = before.to(harness.DEVICE), before, after.to(harness.DEVICE), after
        slots = allocator.alloc_extend(*given, last, sum(added))
        for row, start, end, own in zip(rows, before.tolist(), after.tolist(), slots.split(added)):
            table[row, start:end], lens[row] = own, end
        for row, end in enumerate(lens):
            first = table[row, :end] - in_page[:end]
            assert (
                torch.equal(first, table[row, torch.arange(end) - in_page[:end]]) and not (first % 64).any()
            )


def break_a_page(runner):
    """A slot in the middle of a page is another page's; returns a batch of that request."""
    runner.wrapper.attn_backends[0].req_to_token[5, 100] = 7
    return make_batch(runner.installed, [2000, 150], [3, 5], harness.DEVICE)


@pytest.mark.parametrize("layout", ["shared", "replicate"])
def test_a_page_in_pieces_is_named(plugin, monkeypatch, layout):
    """With SGLang's paged allocator one slot of each page is read: those taken for granted are compared."""
    runner = test_derived.served_runner(plugin, monkeypatch, layout, 4, SGLANG_NSA_VERIFY_METADATA=1)
    runner.capture(2)
    assert draft_metadata_of(runner.wrapper).whole_pages
    batch = break_a_page(runner)
    with pytest.raises(
        MetadataMismatchError, match=r"page_table_1 of backend 0, row 1, column 100: expected 7"
    ):
        runner.replay(batch, 2)


def derived_allocator(allocator):
    kind = type("SomeAllocator", (type(allocator),), {})
    allocator.__class__ = kind
    return allocator


def other_pages(allocator):
    allocator.page_size *= 2
    return allocator


@pytest.mark.parametrize("change", [derived_allocator, other_pages, lambda allocator: None])
def test_slots_may_be_anywhere_with_other_allocators(plugin, monkeypatch, change):
    make = harness.slot_allocator
    monkeypatch.setattr(harness, "slot_allocator", lambda *given: change(make(*given)))
    runner = test_derived.served_runner(plugin, monkeypatch, "shared", 4, SGLANG_NSA_VERIFY_METADATA=1)
    runner.capture(2)
    draft = draft_metadata_of(runner.wrapper)
    assert not draft.whole_pages
    runner.replay(break_a_page(runner), 2)
    assert draft.counters.verified == draft.counters.generated == 1


FIELDS = [
    "cu_seqlens_k",
    "page_table_1",
    "real_page_table",
    "{p}_cache_seqlens_int32",
    "{p}_cu_seqlens_k",
    "paged_mqa_schedule_metadata",
]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("backend", [0, 2])
def test_a_difference_is_named(plugin, monkeypatch, field, backend):
    runner = test_derived.served_runner(plugin, monkeypatch, "replicate", 4, SGLANG_NSA_VERIFY_METADATA=1)
    runner.capture(4)
    name = field.format(p=runner.installed.family.prefix)
    draft = draft_metadata_of(runner.wrapper)
    generate = draft._launches[4]

    def corrupt():
        generate()
        tensor = getattr(runner.wrapper.attn_backends[backend].decode_cuda_graph_metadata[4], name)
        tensor.view(-1)[0] += 1

    draft._launches[4] = corrupt
    with pytest.raises(
        MetadataMismatchError, match=rf"{field.removeprefix('{p}_')} of backend {backend}, row 0"
    ):
        run(runner, 1, "replicate", sizes=(4,))
