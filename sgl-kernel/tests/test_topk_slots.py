"""The top-k's slots against a sort whose key says everything, with poison wherever none may read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import Malformed, check, i32, reject
from sgl_kernel import topk_slots

INF, NAN = float("inf"), float("nan")
PIECE = 32768  # keys of a block; more take another launch
VALUES = {
    "normal": lambda g, *shape: torch.randn(shape, generator=g),
    "equal": lambda g, *shape: torch.full(shape, 0.5),
    "zero": lambda g, *shape: torch.zeros(shape),
    "mostly zero": lambda g, *shape: torch.randn(shape, generator=g).sub(1).relu(),
    "close": lambda g, *shape: torch.randn(shape, generator=g) * 1e-3 + 11,  # one exponent
    "outliers": lambda g, *shape: (
        torch.randn(shape, generator=g) * 10.0 ** torch.randint(-8, 9, shape, generator=g)
    ),
    "lowest": lambda g, *shape: (
        torch.randn(shape, generator=g)
        .clamp(min=0.3)
        .masked_fill(torch.rand(shape, generator=g) < 0.5, torch.finfo(torch.float32).min)
    ),
    "ties": lambda g, *shape: torch.randint(-9, 9, shape, generator=g).float(),
    "ascending": lambda g, *shape: torch.arange(shape[1]).float().expand(shape),
    "descending": lambda g, *shape: -torch.arange(shape[1]).float().expand(shape),
    "denormal": lambda g, *shape: torch.randint(-99, 99, shape, generator=g) * 1e-45,
    "any bits": lambda g, *shape: (
        torch.randint(-(2**31), 2**31, shape, generator=g).int().view(torch.float32)
    ),
    "special": lambda g, *shape: torch.tensor(
        [0.0, -0.0, 1e-45, -1e-45, 3.5, -3.5, INF, -INF, NAN, -NAN, 3.4e38, -3.4e38]
    )[torch.randint(12, shape, generator=g)],
}


def ordered(scores: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the scores: the usual sign-magnitude trick, with -0.0 as 0.0."""
    bits = scores.view(torch.int32).long()
    bits = bits.where(scores != 0, 0)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@dataclass(frozen=True)
class Case:
    lengths: list[int]
    topk: int
    width: int
    values: str = "normal"
    table_rows: list[int] | None = None
    rows_per_req: int = 1
    first_row: int = 0
    padding_slot: int = -1
    wide: bool = False  # table_rows in int64
    seed: int = 0


class Rig:
    def __init__(self, case: Case, device: str) -> None:
        self.case, g = case, torch.Generator().manual_seed(case.seed)
        rows, stride = len(case.lengths), -(-case.width // 4) * 4 + 4
        tables = rows if case.table_rows is None else max(case.table_rows) + 1
        self.scores = VALUES[case.values](g, rows, stride).clone()
        self.table = torch.randperm(max(tables * case.width, 1), generator=g).int()[: tables * case.width]
        self.table = self.table.view(tables, case.width)
        self.expected = self.reference()
        dead = torch.arange(stride) >= torch.tensor(case.lengths).clamp(max=case.width)[:, None]
        self.scores.masked_fill_(dead, INF)  # what nobody may select
        self.scores, self.table = self.scores.to(device), self.table.to(device)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        dtype = torch.int64 if case.wide else torch.int32
        self.owners = case.table_rows and torch.tensor(case.table_rows, dtype=dtype, device=device)

    def reference(self) -> torch.Tensor:
        case = self.case
        out = torch.full((len(case.lengths), case.topk), case.padding_slot, dtype=torch.int32)
        for t, length in enumerate(case.lengths):
            keys = ordered(self.scores[t, : max(0, min(length, case.width))])
            best = keys.sort(descending=True, stable=True).indices[: case.topk].sort().values
            owner = t if case.table_rows is None else (t + case.first_row) // case.rows_per_req
            owner = owner if case.table_rows is None else case.table_rows[owner]
            out[t, : len(best)] = self.table[owner, best]
        return out

    def run(self) -> torch.Tensor:
        case = self.case
        slots = i32(len(case.lengths), case.topk, device=self.scores.device)
        topk_slots(
            *(self.scores, self.table, self.owners, self.lengths, slots),
            width=case.width,
            first_row=case.first_row,
            rows_per_req=case.rows_per_req,
            padding_slot=case.padding_slot,
        )
        return slots

    def check(self) -> None:
        assert torch.equal(self.run().cpu(), self.expected), self.case


CASES = [
    *[Case([0, 1, 15, 16, 17, 64, 79, 80], 16, 80, values) for values in VALUES],
    *[Case([3000, 2049, 2048, 4097], 2048, 4100, values, seed=1) for values in VALUES],
    Case([5, 3], 64, 9),  # topk beyond the width
    Case([7, -3, 99], 4, 13, "ties"),  # lengths beyond it
    Case([0, 0], 3, 0),
    Case([1, 2, 60], 1, 61),
    Case([70, 3, 17, 1], 16, 80, table_rows=[5, 2, 7, 0]),
    Case([30, 31, 32, 33, 1, 2, 3, 4], 16, 80, table_rows=[6, 1], rows_per_req=4, padding_slot=0, wide=True),
    Case([31, 32, 33, 34, 35], 16, 80, table_rows=[0, 0, 3, 1], rows_per_req=3, first_row=5),
    Case([9000, 8999], 4100, 9001, "ties"),  # more than shared memory holds positions of
    Case([513] * 130, 64, 515, "mostly zero"),  # many rows: small blocks
    Case([7168, 7165, 7000, 4100] * 32, 2048, 7168, "mostly zero", table_rows=[0] * 128),
    Case([8192, 8191, 8188, 6000] * 32, 2048, 8192, "close", table_rows=[0] * 128),
]
LONG_CASES = [
    Case([PIECE, PIECE + 1, PIECE + 500, 0, 3, 2049], 2048, PIECE + 500),
    Case([2 * PIECE, PIECE - 1, 70001], 2048, 70001, "mostly zero", table_rows=[1, 0, 1]),
    Case([131072], 2048, 131072, "close"),
    Case([PIECE + 77], 8192, PIECE + 77, "ties"),
    Case([70000, 69999], 8192, 70000, "ties"),  # several launches: candidates do not fit a block either
]


@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=str)
def test_topk_slots(case: Case, device: str) -> None:
    Rig(case, device).check()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_random(data: st.DataObject) -> None:
    width = data.draw(st.integers(0, 700))
    lengths = data.draw(st.lists(st.integers(-1, width + 2), min_size=1, max_size=4))
    values, topk = data.draw(st.sampled_from(list(VALUES))), data.draw(st.integers(1, width + 5))
    Rig(Case(lengths, topk, width, values, seed=data.draw(st.integers(0, 99))), "cpu").check()


@pytest.mark.gpu
def test_captured(cuda: str) -> None:
    """Lengths, scores and tables are read at every replay; rows of one piece and of several in one call."""
    rig = Rig(LONG_CASES[0], cuda)
    slots = rig.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = rig.run()
    for seed in (1, 2):
        other = Rig(Case([40, PIECE + 3, 9000, 2049, 0, PIECE], 2048, PIECE + 500, "ties", seed=seed), cuda)
        for name in ("scores", "table", "lengths"):
            getattr(rig, name).copy_(getattr(other, name))
        graph.replay()
        assert torch.equal(slots.cpu(), other.expected)


def good(device: str) -> dict[str, object]:
    return {
        "scores": torch.zeros(3, 16, device=device),
        "page_table": torch.zeros(2, 12, dtype=torch.int32, device=device),
        "table_rows": torch.zeros(3, dtype=torch.int64, device=device),
        "lengths": torch.full((3,), 9, dtype=torch.int32, device=device),
        "slots": i32(3, 4, device=device),
        "width": 10,
    }


def change(**changes: object) -> object:
    return lambda arguments: (
        arguments
        | {name: value(arguments[name]) if callable(value) else value for name, value in changes.items()}
    )


def overlapping(arguments: dict[str, object]) -> dict[str, object]:
    memory = i32(3, 16, device=arguments["slots"].device)
    return arguments | {"page_table": memory, "slots": memory[:, 8:12]}


REJECTED = [
    reject("dtype", "scores: expected float32, found bfloat16", change(scores=lambda s: s.bfloat16())),
    reject("rank", "lengths: expected rank 1, found 2", change(lengths=lambda l: l[None])),
    reject(
        "rows", "scores: expected a shape of at least [3, 10], found [2, 16]", change(scores=lambda s: s[:2])
    ),
    reject("width", "page_table: expected a shape of at least [0, 13], found [2, 12]", change(width=13)),
    reject(
        "owners",
        "table_rows: expected a shape of at least [3], found [2]",
        change(table_rows=lambda t: t[:2]),
    ),
    reject("owner", "table_rows: expected a shape of at least [4], found [3]", change(first_row=1)),
    reject("own tables", "page_table: expected a shape of at least [3, 10], found", change(table_rows=None)),
    reject(
        "owners' dtype", "table_rows: expected int32 or int64, found", change(table_rows=lambda t: t.float())
    ),
    reject(
        "lengths", "lengths: expected a shape of at least [3], found [2]", change(lengths=lambda l: l[:2])
    ),
    reject(
        "address", "scores: expected rows that begin at multiples of 16", change(scores=lambda s: s[:, 1:])
    ),
    reject("columns", "scores: expected an inner stride of 1", change(scores=lambda s: s.T.contiguous().T)),
    reject("rows_per_req", "rows_per_req: expected 1 .. 2147483647, found 0", change(rows_per_req=0)),
    reject("negative width", "width: expected 0 .. 1073741823, found -1", change(width=-1)),
    reject("topk", "topk: expected 1 .. 8192, found 8193", change(slots=lambda s: s.new_empty(3, 8193))),
    reject("overlap", "slots: expected memory apart from every input", overlapping),
]


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case: Malformed, device: str) -> None:
    arguments = good(device)
    check(case, "topk_slots", lambda: topk_slots(**case.change(arguments)), [arguments["slots"]])


def test_nothing_to_do(device: str) -> None:
    arguments = good(device)
    none = {name: arguments[name][:0] for name in ("scores", "lengths", "slots", "table_rows")}
    topk_slots(**arguments | none)
