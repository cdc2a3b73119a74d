"""mini-sglang's real GraphRunner, FlashAttentionBackend and Scheduler on the CPU, in the three modes.

Nothing of mini-sglang is replaced but what needs a GPU: pinned memory, and the captured graph, which here
runs what was captured again over the same static tensors. The model is a function of all that a decode step
reads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Its folder `python`; folders of what it imports may stand behind a colon.
if "MINISGL_SOURCES" in os.environ:
    sys.path += os.environ["MINISGL_SOURCES"].split(":")
REASON = "mini-sglang is not importable (it is on no registry; MINISGL_SOURCES names its folder `python`)"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("minisgl") is None, reason=REASON)

MODES = ("0", "1", "in_graph")
REQUESTS, WIDTH, VOCAB = 11, 96, 97
SIZES = [1, 2, 4, 8, 16]


class Unpinned:
    """torch, where memory cannot be pinned."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)

    @staticmethod
    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.empty(*args, **kwargs)


class CPUGraph:
    """Runs what the runner captured again, with the batch that it captured."""

    def capture(self, model: Any, runner: Any, context: Any) -> None:
        self.model, self.runner, self.context, self.batch = model, runner, context, context.batch

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        live, self.context._batch = self.context._batch, self.batch
        self.runner.buffer.logits[: self.batch.size] = self.model.forward()
        self.context._batch = live


class Model:
    """Reads every input of a decode step as attention would: of a page table the live part alone."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def forward(self) -> torch.Tensor:  # [bs, VOCAB], float32
        batch = self.context.batch
        metadata, rows = batch.attn_metadata, []
        for i in range(batch.size):
            length = int(metadata.cache_seqlens[i])
            assert int(metadata.cu_seqlens_k[i + 1] - metadata.cu_seqlens_k[i]) == length
            assert int(batch.positions[i]) == length - 1
            pages = metadata.page_table[i, : -(-length // self.context.page_size)].tolist()
            rows.append(hash((int(batch.input_ids[i]), int(batch.out_loc[i]), tuple(pages))) % VOCAB)
        return torch.nn.functional.one_hot(torch.tensor(rows), VOCAB).float()


@pytest.fixture
def minisgl(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What a test needs of mini-sglang, its classes as they were afterwards."""
    from minisgl import core
    from minisgl.attention import fa
    from minisgl.distributed import info
    from minisgl.engine import graph
    from minisgl.scheduler import cache, scheduler

    for module in (fa, cache, scheduler):
        monkeypatch.setattr(module, "torch", Unpinned())
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(graph, "get_free_memory", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CPUGraph)

    @contextlib.contextmanager
    def capturing(target: CPUGraph, **_: Any) -> Iterator[None]:
        caller = sys._getframe(2).f_locals
        target.capture(caller["model"], caller["self"], core.get_global_ctx())
        yield

    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(info, "_TP_INFO", info.DistributedInfo(0, 1))
    yield SimpleNamespace(core=core, fa=fa, graph=graph, scheduler=scheduler, cache=cache, patch=monkeypatch)


class Engine:
    """An engine's parts, with mini-sglang's runner and attention backend."""

    def __init__(self, minisgl: SimpleNamespace, page_size: int) -> None:
        self.context = minisgl.core.Context(page_size)
        minisgl.patch.setattr(minisgl.core, "_GLOBAL_CTX", self.context)
        device = torch.device("cpu")
        self.page_table = self.context.page_table = torch.zeros(REQUESTS + 1, WIDTH, dtype=torch.int32)
        num_tokens = REQUESTS * WIDTH
        self.page_table[REQUESTS].fill_(num_tokens)
        self.context.kv_cache = SimpleNamespace(device=device)
        self.attn_backend = minisgl.fa.FlashAttentionBackend(SimpleNamespace(head_dim=64))
        dummy = minisgl.core.Req(
            input_ids=torch.tensor([0], dtype=torch.int32), table_idx=REQUESTS, cached_len=0, output_len=1,
            uid=-1, sampling_params=None, cache_handle=None,
        )  # fmt: skip
        self.graph_runner = minisgl.graph.GraphRunner(
            stream=None, device=device, model=Model(self.context), attn_backend=self.attn_backend,
            cuda_graph_bs=SIZES, cuda_graph_max_bs=None, free_memory=0, max_seq_len=WIDTH,
            vocab_size=VOCAB, dummy_req=dummy,
        )  # fmt: skip
        self.num_pages = num_tokens // page_size
        self.sampler = SimpleNamespace(prepare=lambda batch: None)

    def forward_batch(self, batch: Any, sample_args: Any) -> Any:
        with self.context.forward_batch(batch):
            assert self.graph_runner.can_use_cuda_graph(batch)
            logits = self.graph_runner.replay(batch)
        for req in batch.reqs:
            req.complete_one()
        return SimpleNamespace(next_tokens_gpu=logits.argmax(-1).to(torch.int32))


def make_scheduler(minisgl: SimpleNamespace, page_size: int) -> Any:
    """A scheduler whose requests were prefilled; `__init__` alone is not mini-sglang's, since it starts the
    engine."""
    from minisgl.scheduler.decode import DecodeManager
    from minisgl.scheduler.table import TableManager

    kind = minisgl.scheduler.Scheduler
    scheduler = kind.__new__(kind)

    def construct(self: Any) -> None:
        self.engine, self.device = Engine(minisgl, page_size), torch.device("cpu")
        self.table_manager = TableManager(REQUESTS, self.engine.page_table)
        self.token_pool = self.table_manager.token_pool
        pages, table = self.engine.num_pages, self.engine.page_table
        self.cache_manager = minisgl.cache.CacheManager(pages, page_size, table, "naive")
        self.decode_manager = DecodeManager(page_size)
        self.prefill_manager = SimpleNamespace(schedule_next_batch=lambda budget: None)
        self.prefill_budget = 0

    # The hook around __init__ has the method that it found; it is given this one in its place.
    hooked = kind.__init__
    if hasattr(hooked, "__wrapped__"):
        from sglang_nsa.minisgl import hooks

        hooks._share_token_pool(construct, scheduler)
    else:
        construct(scheduler)
    return scheduler


def generate(minisgl: SimpleNamespace, page_size: int, seed: int) -> list[list[int]]:
    """Decodes requests of random lengths until all are done: batches shrink from one captured size to the
    next."""
    scheduler = make_scheduler(minisgl, page_size)
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    reqs = []
    for i in range(REQUESTS):
        length, more = draw(2, WIDTH // 2), draw(1, WIDTH // 2 - 1)
        tokens = torch.randint(1, VOCAB, (length,), generator=generator, dtype=torch.int32)
        req = minisgl.core.Req(
            input_ids=tokens, table_idx=i, cached_len=0, output_len=more, uid=i,
            sampling_params=minisgl.core.SamplingParams(), cache_handle=None,
        )  # fmt: skip
        scheduler.cache_manager.allocate_paged([req])
        scheduler.token_pool[i, :length] = tokens
        req.cached_len = length - 1  # the last token's key is written by the first decode step
        reqs.append(req)
    answers: list[list[int]] = [[] for _ in reqs]
    decoding = scheduler.decode_manager
    decoding.filter_reqs(reqs)
    # In the order of their numbers, and so their slots: mini-sglang's set has that of their addresses.
    decoding.schedule_next_batch = lambda: minisgl.core.Batch(
        sorted(decoding.running_reqs, key=lambda req: req.uid), "decode"
    )
    while decoding.runnable:
        prepared = scheduler._schedule_next_batch()
        output = scheduler._forward(prepared)
        for req, token in zip(prepared.batch.reqs, output.next_tokens_gpu.tolist(), strict=True):
            answers[req.uid].append(token)
    assert all(len(a) == r.max_device_len - len(r.input_ids) for a, r in zip(answers, reqs, strict=True))
    return answers


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_three_modes_give_the_same_tokens(minisgl: SimpleNamespace, page_size: int) -> None:
    from sglang_nsa.minisgl import Mode, install

    hooked = (
        (minisgl.graph.GraphRunner, ("_capture_graphs",)),
        (minisgl.scheduler.Scheduler, ("__init__", "_prepare_batch", "_schedule_next_batch")),
    )
    results = {}
    for mode in MODES:
        with minisgl.patch.context() as patch:
            for owner, names in hooked:
                for name in names:  # as they were, afterwards
                    patch.setattr(owner, name, vars(owner)[name])
            patch.setattr(minisgl.graph.GraphRunner, "_sglang_nsa_mode", None, raising=False)
            patch.setenv("MINISGL_USE_FUSED_COPY", mode)
            assert install() is Mode(mode)
            assert install() is Mode(mode)  # twice is once
            results[mode] = [generate(minisgl, page_size, seed) for seed in range(3)]
    assert results["1"] == results["0"]
    assert results["in_graph"] == results["0"]
    assert len({tuple(answer) for answer in results["0"][0]}) > REQUESTS // 2


def changed_copy(module: Any) -> None:
    """As a later mini-sglang might: what is copied is not what the batch has."""

    def copy_from(self: Any, batch: Any) -> None:
        self.input_ids[: batch.padded_size] = batch.input_ids
        self.out_loc[: batch.padded_size] = batch.out_loc
        self.positions[: batch.padded_size] = batch.positions + 1

    module.GraphCaptureBuffer.copy_from = copy_from


def one_more_tensor(module: Any) -> None:
    original = module.GraphCaptureBuffer.init.__func__

    def init(cls: type, bs: int, vocab_size: int, device: torch.device) -> Any:
        buffer = original(cls, bs, vocab_size, device)
        buffer.mrope_positions = torch.zeros(bs, dtype=torch.int32)
        return buffer

    module.GraphCaptureBuffer.init = classmethod(init)


CHANGES = [
    ("1", changed_copy, "a probe batch left something else in GraphCaptureBuffer.positions"),
    ("1", one_more_tensor, "not known here: GraphCaptureBuffer.mrope_positions"),
    ("in_graph", one_more_tensor, "not known here: GraphCaptureBuffer.mrope_positions"),
]


@pytest.mark.parametrize(("mode", "change", "reason"), CHANGES)
def test_a_mini_sglang_that_is_not_known_is_left_alone(
    minisgl: SimpleNamespace, mode: str, change: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_nsa.minisgl import hooks

    buffer, said = minisgl.graph.GraphCaptureBuffer, []
    monkeypatch.setattr(hooks, "_leave_alone", lambda reason: said.append(str(reason)))
    monkeypatch.setenv("MINISGL_USE_FUSED_COPY", mode)
    for owner, name in (
        (buffer, "copy_from"),
        (buffer, "init"),
        (minisgl.graph.GraphRunner, "_capture_graphs"),
        (minisgl.scheduler.Scheduler, "__init__"),
        (minisgl.scheduler.Scheduler, "_prepare_batch"),
        (minisgl.scheduler.Scheduler, "_schedule_next_batch"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    monkeypatch.setattr(minisgl.graph.GraphRunner, "_sglang_nsa_mode", None, raising=False)
    change(minisgl.graph)
    hooks.install()
    engine = Engine(minisgl, 1)
    assert said == [reason]
    assert "copy_from" not in vars(engine.graph_runner.buffer)
    assert hooks.in_graph_replay(engine.graph_runner) is None
