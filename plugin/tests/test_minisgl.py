"""The hooks for mini-sglang without mini-sglang: against objects with the same attributes, and a package with
the same names that is started in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_nsa.minisgl.fields import ATTENTION, INPUTS, ReplayBuffers
from sglang_nsa.minisgl.fused_replay import FusedReplay
from sglang_nsa.minisgl.in_graph import InGraphReplay
from sglang_nsa.minisgl.settings import Mode

POISON = -7
MOST_BS, WIDTH, REQUESTS = 16, 96, 12
SIZES = [1, 2, 4, 8, 16]


def full(*shape: int) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=torch.int32)


def make_buffers(attention: bool, page_size: int = 1) -> ReplayBuffers:
    """A runner's buffer and a FlashAttention backend's capture data, by their attributes."""
    buffer = SimpleNamespace(
        input_ids=full(MOST_BS),
        out_loc=full(MOST_BS),
        positions=full(MOST_BS),
        logits=torch.zeros(MOST_BS, 3),
    )
    capture = SimpleNamespace(
        seq_lens=full(MOST_BS), positions=full(MOST_BS), cu_seqlens_k=full(MOST_BS + 1),
        cu_seqlens_q=full(MOST_BS + 1), page_table=full(MOST_BS, WIDTH // page_size),
    )  # fmt: skip
    dummy = SimpleNamespace(table_idx=REQUESTS, device_len=1, can_decode=False)
    runner = SimpleNamespace(buffer=buffer, graph_bs_list=SIZES, dummy_req=dummy)
    return ReplayBuffers(runner, SimpleNamespace(capture=capture) if attention else None)


def make_batch(bs: int, width: int, generator: torch.Generator) -> SimpleNamespace:
    """A padded batch with new tensors."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, 1 << 30, shape, generator=generator, dtype=torch.int32)

    metadata = SimpleNamespace(cu_seqlens_k=draw(bs + 1), cache_seqlens=draw(bs), page_table=draw(bs, width))
    return SimpleNamespace(
        input_ids=draw(bs),
        out_loc=draw(bs),
        positions=draw(bs),
        attn_metadata=metadata,
        padded_reqs=[None] * bs,
    )


@pytest.mark.parametrize("attention", [True, False], ids=["FlashAttention", "another backend"])
def test_a_fused_replay_copies_what_the_six_copies_do(attention: bool) -> None:
    buffers, generator = make_buffers(attention), torch.Generator().manual_seed(0)
    replay = FusedReplay(buffers)
    replay.install()
    for bs, width in [(1, 1), (16, WIDTH), (4, 33), (16, 7), (2, 96), (8, 50)]:
        for tensor in buffers.tensors().values():
            tensor.fill_(POISON)
        batch = make_batch(bs, width, generator)
        buffers.runner.buffer.copy_from(batch)
        if attention:
            buffers.attention.prepare_for_replay(batch)
        sources = dict(zip((f.name for f in buffers.fields), buffers.sources()(batch), strict=True))
        for field in buffers.fields:
            expected = torch.full_like(buffers.tensor(field), POISON)
            live = (slice(bs), slice(width)) if field.is_table else (slice(bs + field.extra),)
            expected[live] = sources[field.name]
            assert torch.equal(buffers.tensor(field), expected), field.name
        assert bool((buffers.holder("attention").positions == POISON).all()) if attention else True


def test_the_tables_name_every_argument_of_the_fused_copy() -> None:
    from sglang_nsa.nsa.kernels import load_kernels

    arguments = load_kernels("cpu").fused_copy_replay_data.__annotations__
    assert {f"dst_{field.name}" for field in INPUTS + ATTENTION} == {a for a in arguments if a[:4] == "dst_"}


def test_a_tensor_that_the_tables_do_not_know_is_found() -> None:
    buffers = make_buffers(attention=True)
    assert buffers.unknown() == []
    buffers.attention.capture.window_table = full(3)
    buffers.runner.buffer.mrope_positions = full(3)
    found = [name.rpartition(".")[2] for name in buffers.unknown()]
    assert found == ["mrope_positions", "window_table"]


def test_an_error_of_a_replay_names_the_field_and_writes_nothing() -> None:
    buffers = make_buffers(attention=True)
    replay = FusedReplay(buffers)
    batch = make_batch(4, 9, torch.Generator().manual_seed(0))
    batch.attn_metadata.cache_seqlens = batch.attn_metadata.cache_seqlens.long()
    with pytest.raises(RuntimeError, match="src_seq_lens: expected int32, found int64"):
        replay.copy(batch)
    assert all(bool((tensor == POISON).all()) for tensor in buffers.tensors().values())


# ---- in_graph


class Tables:
    """mini-sglang's page table and token pool, filled with what is found nowhere else."""

    def __init__(self, page_size: int) -> None:
        pages = torch.randperm(5000, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        per_row = WIDTH // page_size
        pages = pages[: (REQUESTS + 1) * per_row].view(REQUESTS + 1, per_row)
        offsets = torch.arange(page_size, dtype=torch.int32)
        self.slots = (pages[..., None] * page_size + offsets).view(REQUESTS + 1, WIDTH)
        self.tokens = torch.arange(self.slots.numel(), dtype=torch.int32).view_as(self.slots) + 100_000


def make_reqs(count: int, generator: torch.Generator) -> list[SimpleNamespace]:
    rows = torch.randperm(REQUESTS, generator=generator).tolist()[:count]
    lens = torch.randint(1, WIDTH + 1, (count,), generator=generator).tolist()
    return [
        SimpleNamespace(table_idx=row, device_len=length, can_decode=i % 3 > 0)
        for i, (row, length) in enumerate(zip(rows, lens, strict=True))
    ]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("attention", [True, False], ids=["FlashAttention", "another backend"])
def test_what_the_graph_generates(attention: bool, page_size: int) -> None:
    buffers, tables = make_buffers(attention, page_size), Tables(page_size)
    replay = InGraphReplay(buffers, tables.slots, page_size)
    replay.token_pool.copy_(tables.tokens)
    for bs in SIZES:
        replay.generate(bs)  # as at capture, with padding alone
    replay.install()
    generator = torch.Generator().manual_seed(2)
    for count, bs in [(1, 1), (3, 4), (8, 8), (12, 16), (9, 16), (2, 2)]:
        for tensor in buffers.tensors().values():
            tensor.fill_(POISON)
        reqs = make_reqs(count, generator)
        padded = reqs + [buffers.runner.dummy_req] * (bs - count)
        batch = SimpleNamespace(reqs=reqs, padded_reqs=padded, padded_size=bs)
        rows, columns = replay.pack(batch)
        buffers.runner.buffer.copy_from(batch)
        if attention:
            buffers.attention.prepare_for_replay(batch)
        assert rows.tolist() == [req.table_idx for req in reqs]
        assert columns.tolist() == [req.device_len if req.can_decode else -1 for req in reqs]
        replay.generate(bs)
        check_generated(buffers, tables, padded, page_size)


def check_generated(buffers: ReplayBuffers, tables: Tables, padded: list[Any], page_size: int) -> None:
    found, bs = buffers.tensors(), len(padded)
    last = [(req.table_idx, req.device_len - 1) for req in padded]
    expected = {
        "input_ids": [int(tables.tokens[at]) for at in last],
        "out_loc": [int(tables.slots[at]) for at in last],
        "positions": [column for _, column in last],
    }
    if buffers.attention is not None:
        lens = [req.device_len for req in padded]
        expected |= {"seq_lens": lens, "cu_seqlens_k": [sum(lens[:i]) for i in range(bs + 1)]}
        for i, req in enumerate(padded):
            live = -(-req.device_len // page_size)
            pages = tables.slots[req.table_idx, : req.device_len : page_size] // page_size
            assert found["page_table"][i, :live].tolist() == pages.tolist()
            assert bool((found["page_table"][i, live:] == POISON).all())
        assert bool((found["page_table"][bs:] == POISON).all())
    for name, values in expected.items():
        assert found[name].tolist() == values + [POISON] * (len(found[name]) - len(values)), name


def test_packed_batches_that_are_under_way_are_not_overwritten() -> None:
    """With overlap a batch is packed while the copy of the one before it may not have run."""
    buffers, tables = make_buffers(attention=False), Tables(1)
    replay = InGraphReplay(buffers, tables.slots, 1)
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(2):
        reqs = make_reqs(4, generator)
        batches.append(SimpleNamespace(reqs=reqs, padded_reqs=reqs, padded_size=4))
        replay.pack(batches[-1])
    for batch in batches:
        replay.copy_from(batch)
        assert replay.rows(4)[0].tolist() == [req.table_idx for req in batch.reqs]


# ---- the variable, and the launcher


@pytest.mark.parametrize(
    ("text", "mode"),
    [("", Mode.OFF), ("0", Mode.OFF), ("no", Mode.OFF), ("1", Mode.FUSED), ("TRUE", Mode.FUSED),
     ("yes", Mode.FUSED), ("in_graph", Mode.IN_GRAPH), (" In_Graph ", Mode.IN_GRAPH)],
)  # fmt: skip
def test_words(text: str, mode: Mode) -> None:
    assert Mode.from_environment({"MINISGL_USE_FUSED_COPY": text}) is mode


def test_unset_is_off() -> None:
    assert Mode.from_environment({}) is Mode.OFF


# A server with mini-sglang's names, whose one scheduler says whether its classes are hooked.
PACKAGE = {
    "__init__.py": "",
    "engine/__init__.py": "",
    "engine/graph.py": "class GraphRunner:\n    def _capture_graphs(self): pass\n",
    "scheduler/__init__.py": "",
    "scheduler/scheduler.py": """
class Scheduler:
    def __init__(self): pass
    def _prepare_batch(self, batch): pass
    def _schedule_next_batch(self): pass
""",
    "server/__init__.py": "from .launch import launch_server\n",
    "server/launch.py": """
import multiprocessing, sys

def _run_scheduler(args, queue):
    from minisgl.engine.graph import GraphRunner
    from minisgl.scheduler.scheduler import Scheduler
    hooked = [hasattr(m, "__wrapped__") for m in (GraphRunner._capture_graphs, Scheduler._prepare_batch)]
    queue.put((args, hooked))

def launch_server():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_run_scheduler, args=(sys.argv[1:], queue))
    process.start()
    print(queue.get(timeout=60))
    process.join()
""",
}
HOOKED = {"0": "[False, False]", "1": "[True, False]", "in_graph": "[True, True]"}


def launch(tmp_path: Path, variable: str) -> subprocess.CompletedProcess:
    for name, text in PACKAGE.items():
        path = tmp_path / "minisgl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "sglang_nsa.minisgl", "--model", "m"],
        env=os.environ | {"PYTHONPATH": path, "MINISGL_USE_FUSED_COPY": variable},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("variable", HOOKED)
def test_the_launcher_hooks_spawned_schedulers(variable: str, tmp_path: Path) -> None:
    """A spawned process imports nothing of the launcher's main module."""
    done = launch(tmp_path, variable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"(['--model', 'm'], {HOOKED[variable]})"


def test_another_value_stops_the_start(tmp_path: Path) -> None:
    done = launch(tmp_path, "fused")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "sglang_nsa.minisgl: MINISGL_USE_FUSED_COPY: expected 0, 1 or in_graph, found 'fused'"
    )


def test_without_mini_sglang_the_launcher_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['minisgl'] = None\n"
         "from sglang_nsa.minisgl.launch import main; main()"],
        env=os.environ | {"MINISGL_USE_FUSED_COPY": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "sglang_nsa.minisgl: " in done.stderr and "minisgl" in done.stderr
