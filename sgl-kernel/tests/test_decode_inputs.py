"""DecodeInputsPlan against a loop over the requests, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import sgl_kernel
import torch
from arena import Arena, assert_same, fill_random
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import POISON, i32

OUTPUTS = ("input_ids", "out_cache_loc", "positions")
INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Case:
    seq_lens: tuple[int, ...]
    indices: tuple[int, ...]
    pool: int = 9
    width: int = 50
    lens_dtype: torch.dtype = torch.int64
    indices_dtype: torch.dtype = torch.int64
    gap: int = 0  # elements between the rows of the tables

    def last_token(self, i: int) -> tuple[int, int]:
        """Row and column."""
        row = self.indices[i] if 0 <= self.indices[i] < self.pool else 0
        return row, min(max(self.seq_lens[i], 1), self.width) - 1


CASES = [
    Case((5, 1, 50), (3, 8, 1)),
    Case((5, 1, 50), (3, 8, 1), lens_dtype=torch.int32, indices_dtype=torch.int32, gap=3),
    Case((0, -7, 51, 1 << 40), (0, 1, 2, 3)),
    Case((4, 4, 4), (-1, 9, 1 << 40)),
    Case((), ()),
    Case((), (), pool=0, width=0),
    Case((1,), (0,), pool=1, width=1),
    Case(tuple(1 + i % 50 for i in range(700)), tuple(i % 9 for i in range(700))),
]


class Rig:
    def __init__(self, case: Case, device: str) -> None:
        self.case, self.arena = case, Arena()
        bs, table = len(case.seq_lens), (case.pool, case.width)
        add = self.arena.add
        self.slots = {
            "seq_lens": add("seq_lens", (bs,), case.lens_dtype),
            "req_pool_indices": add("req_pool_indices", (bs,), case.indices_dtype),
            "req_to_token": add("req_to_token", table, torch.int32, case.gap),
            "token_pool": add("token_pool", table, torch.int32, case.gap * 2),
            **{name: add(name, (bs,), torch.int32, shift=k) for k, name in enumerate(OUTPUTS)},
        }
        self.fresh = self.arena.buffer()
        generator = torch.Generator().manual_seed(0)
        for name in ("req_to_token", "token_pool"):
            fill_random(self.slots[name].view(self.fresh), generator)
        for name, values in (("seq_lens", case.seq_lens), ("req_pool_indices", case.indices)):
            self.slots[name].view(self.fresh).copy_(torch.tensor(values, dtype=torch.int64))
        self.buffer = self.fresh.to(device, copy=True)
        tensors = {name: slot.view(self.buffer) for name, slot in self.slots.items()}
        self.plan = sgl_kernel.DecodeInputsPlan(bs=bs, **tensors)

    def expected(self) -> torch.Tensor:
        expected = self.fresh.clone()
        views = {name: slot.view(expected) for name, slot in self.slots.items()}
        for i in range(len(self.case.seq_lens)):
            row, column = self.case.last_token(i)
            views["input_ids"][i] = views["token_pool"][row, column]
            views["out_cache_loc"][i] = views["req_to_token"][row, column]
            views["positions"][i] = column
        return expected

    def check(self) -> None:
        self.buffer.copy_(self.fresh)
        self.plan.run()
        assert_same(self.arena, self.buffer, self.expected(), self.case)


@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop(case: Case, device: str) -> None:
    Rig(case, device).check()


NUMBERS = st.integers(-3, 60)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=20), st.sampled_from(INDEX_DTYPES), st.integers(0, 3))
def test_random_cases(requests: list[tuple[int, int]], dtype: torch.dtype, gap: int) -> None:
    lens, indices = zip(*requests, strict=True) if requests else ((), ())
    Rig(Case(lens, indices, lens_dtype=dtype, indices_dtype=dtype, gap=gap), "cpu").check()


@pytest.mark.gpu
def test_captured_once_it_follows_lengths_and_tables(cuda: str) -> None:
    rig = Rig(CASES[-1], cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rig.plan.run()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        lens = torch.randint(1, 51, (700,), generator=generator)
        rig.case = Case(tuple(lens.tolist()), rig.case.indices)
        rig.slots["seq_lens"].view(rig.fresh).copy_(lens)
        fill_random(rig.slots["token_pool"].view(rig.fresh), generator)
        rig.buffer.copy_(rig.fresh)
        graph.replay()
        assert_same(rig.arena, rig.buffer, rig.expected(), "replayed")


def good(device: str) -> dict[str, object]:
    tables = {n: torch.zeros(3, 8, dtype=torch.int32, device=device) for n in ("req_to_token", "token_pool")}
    index = {n: torch.ones(2, dtype=torch.int64, device=device) for n in ("seq_lens", "req_pool_indices")}
    return {"bs": 2, **index, **tables, **{name: i32(2, device=device) for name in OUTPUTS}}


Changes = Callable[[dict], dict]
WRONG: list[tuple[Changes, str]] = [
    (lambda a: {"bs": -1}, "bs: expected 0 .. 2147483647, found -1"),
    (lambda a: {"bs": 3}, "seq_lens: expected a shape of at least [3], found [2]"),
    (lambda a: {"seq_lens": a["seq_lens"].float()}, "seq_lens: expected int32 or int64, found float32"),
    (
        lambda a: {"req_pool_indices": a["req_pool_indices"].short()},
        "req_pool_indices: expected int32 or int64, found int16",
    ),
    (lambda a: {"token_pool": a["token_pool"].long()}, "token_pool: expected int32, found int64"),
    (
        lambda a: {"token_pool": a["token_pool"][:, :7]},
        "token_pool: expected the shape of req_to_token, [3, 8], found [3, 7]",
    ),
    (lambda a: {"req_to_token": a["req_to_token"][0]}, "req_to_token: expected rank 2, found 1"),
    (
        lambda a: {"req_to_token": a["req_to_token"][:0]},
        "req_to_token: expected a shape of at least [1, 1], found [0, 8]",
    ),
    (lambda a: {"positions": a["positions"][:1]}, "positions: expected a shape of at least [2], found [1]"),
    (lambda a: {"positions": a["positions"].long()}, "positions: expected int32, found int64"),
    (lambda a: {"positions": a["positions"][:1].expand(2)}, "positions: expected an inner stride of 1"),
    (lambda a: {"positions": a["input_ids"]}, "positions: expected memory apart from every other"),
    (lambda a: {"input_ids": a["token_pool"][1]}, "input_ids: expected memory apart from every input"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:50] for _, message in WRONG])
def test_what_is_refused(changes: Changes, message: str, device: str) -> None:
    arguments = good(device)
    with pytest.raises(RuntimeError, match=re.escape(f"decode_inputs: {message}")):
        sgl_kernel.DecodeInputsPlan(**(arguments | changes(arguments)))
    assert all(bool((arguments[name] == POISON).all()) for name in OUTPUTS)
