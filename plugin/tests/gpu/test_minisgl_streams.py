"""in_graph on a GPU: what the captured nodes write, and that the scheduler waits until they have read.

Run with --noconftest and plugin/tests on the import path: nothing is stood in for here.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_nsa.minisgl.fields import ReplayBuffers
from sglang_nsa.minisgl.in_graph import InGraphReplay
from test_minisgl import REQUESTS, SIZES, Tables, check_generated, make_buffers, make_reqs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BS = 8


def on_gpu(buffers: ReplayBuffers) -> ReplayBuffers:
    for holder in (buffers.runner.buffer, buffers.attention.capture):
        for name, tensor in vars(holder).items():
            setattr(holder, name, tensor.cuda())
    return buffers


def on_cpu(buffers: ReplayBuffers) -> ReplayBuffers:
    for holder in (buffers.runner.buffer, buffers.attention.capture):
        for name, tensor in vars(holder).items():
            setattr(holder, name, tensor.cpu())
    return buffers


def capture(replay: InGraphReplay, bs: int) -> torch.cuda.CUDAGraph:
    replay.generate(bs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replay.generate(bs)
    return graph


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_captured_graph_follows_the_packed_batches(page_size: int) -> None:
    tables, generator = Tables(page_size), torch.Generator().manual_seed(0)
    buffers = on_gpu(make_buffers(attention=True, page_size=page_size))
    replay = InGraphReplay(buffers, tables.slots.cuda(), page_size)
    replay.token_pool.copy_(tables.tokens)
    graphs = {bs: capture(replay, bs) for bs in SIZES}
    for count, bs in [(1, 1), (3, 4), (8, 8), (12, 16), (2, 2), (1, 1)] * 5:
        for tensor in buffers.tensors().values():
            tensor.fill_(-7)
        reqs = make_reqs(count, generator)
        padded = reqs + [buffers.runner.dummy_req] * (bs - count)
        batch = SimpleNamespace(reqs=reqs, padded_reqs=padded, padded_size=bs)
        rows, columns = replay.pack(batch)
        replay.copy_from(batch)
        graphs[bs].replay()
        copies = ReplayBuffers(
            SimpleNamespace(buffer=SimpleNamespace(**vars(buffers.runner.buffer))),
            SimpleNamespace(capture=SimpleNamespace(**vars(buffers.attention.capture))),
        )
        check_generated(on_cpu(copies), tables, padded, page_size)
        assert rows.tolist() == [req.table_idx for req in reqs]
        assert columns.tolist() == [req.device_len if req.can_decode else -1 for req in reqs]


@pytest.mark.parametrize("waits", [True, False])
def test_the_tables_are_written_only_after_the_graph_has_read_them(waits: bool) -> None:
    """Without the wait the graph, late behind other work, reads what the next batch's preparation wrote: a
    key would go to another request's slot."""
    tables, generator = Tables(1), torch.Generator().manual_seed(1)
    buffers = on_gpu(make_buffers(attention=True))
    slots = tables.slots.cuda()
    replay = InGraphReplay(buffers, slots, 1)
    replay.token_pool.copy_(tables.tokens)
    graph = capture(replay, BS)
    engine, scheduler = torch.cuda.Stream(), torch.cuda.Stream()
    reqs = make_reqs(BS, generator)
    batch = SimpleNamespace(reqs=reqs, padded_reqs=reqs, padded_size=BS)
    torch.cuda.synchronize()
    with torch.cuda.stream(engine):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        replay.pack(batch)
        replay.copy_from(batch)
        graph.replay()
    with torch.cuda.stream(scheduler):
        if waits:
            replay.wait_until_read()
        slots.fill_(-1)
        replay.token_pool.fill_(-1)
    torch.cuda.synchronize()
    found = buffers.tensors()["out_loc"][:BS].tolist()
    expected = [int(tables.slots[req.table_idx, req.device_len - 1]) for req in reqs]
    assert found == (expected if waits else [-1] * BS)
    assert REQUESTS >= BS
