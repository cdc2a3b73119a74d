"""The index scores against torch's products: poison where none may read, canaries where none may write."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from malformed import Malformed, check, reject
from sgl_kernel import index_scores, serves_index_scores
from test_topk_slots import change

DIM = 128
CANARY, POISON_SLOT = -77.0, -(2**31)
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    lengths: list[int]
    topk: int = 16
    width: int = 300
    heads: int = 64
    table_rows: list[int] | None = None
    rows_per_req: int | None = None
    first_row: int = 0
    wide: bool = False  # table_rows in int64
    gaps: int = 0  # elements, a multiple of 8, between the rows of every tensor
    integers: bool = False  # small ones: every sum is exact
    seed: int = 0

    def live(self) -> list[int]:
        """Keys of each row that count."""
        return [max(0, min(length, self.width)) for length in self.lengths]

    def owners(self) -> list[int]:
        if self.table_rows is None:
            return list(range(len(self.lengths)))
        rows = range(self.first_row, self.first_row + len(self.lengths))
        return [self.table_rows[row // (self.rows_per_req or 1)] for row in rows]


class Rig:
    """All that none may read is poison: slots outside memory, keys that are no numbers."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, g = case, torch.Generator().manual_seed(case.seed)
        rows, gaps, owners, live = len(case.lengths), case.gaps, case.owners(), case.live()
        tables = max([-1, *owners]) + 1
        longest = [max([0, *(n for n, o in zip(live, owners) if o == table)]) for table in range(tables)]
        slots = torch.randperm(sum(longest) + 40, generator=g) + 1
        keys = torch.full((len(slots) + 1, DIM + gaps), NAN).index_fill_(0, torch.tensor(0), INF)
        table = torch.full((tables, case.width + gaps), POISON_SLOT, dtype=torch.int32)
        start = 0
        for owner, count in enumerate(longest):
            own = slots[start : start + count]
            keys[own, :DIM] = self.values(g, count, DIM)
            table[owner, :count] = own.int()
            start += count
        self.q = self.values(g, rows, case.heads, DIM + gaps).bfloat16().to(device)[..., :DIM]
        self.weights = self.values(g, rows, case.heads + gaps).to(device)[:, : case.heads]
        self.keys = keys.bfloat16().to(device)[:, :DIM]
        self.table = table.to(device)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        dtype = torch.int64 if case.wide else torch.int32
        self.owners = case.table_rows and torch.tensor(case.table_rows, dtype=dtype, device=device)
        stride = -(-case.width // 4) * 4 + 4 + gaps
        self.buffer = torch.full((rows + 2, stride), CANARY, device=device)  # a row of canaries on each side

    def values(self, g: torch.Generator, *shape: int) -> torch.Tensor:
        return (
            torch.randint(-3, 4, shape, generator=g).float()
            if self.case.integers
            else torch.randn(shape, generator=g)
        )

    def expected(self) -> torch.Tensor:
        """The whole buffer, in float64 but for canaries."""
        case, q, keys, weights = (
            self.case,
            self.q.cpu().double(),
            self.keys.cpu().double(),
            self.weights.cpu(),
        )
        out = torch.full(self.buffer.shape, CANARY, dtype=torch.float64)
        for t, (length, owner) in enumerate(zip(case.live(), case.owners())):
            if length > case.topk:
                per_head = q[t] @ keys[self.table.cpu()[owner, :length].long()].T
                out[t + 1, :length] = weights[t].double() @ per_head.relu()
        return out

    def run(self) -> torch.Tensor:
        case = self.case
        index_scores(
            *(self.q, self.weights, self.keys, self.table, self.owners, self.lengths, self.buffer[1:-1]),
            width=case.width,
            topk=case.topk,
            first_row=case.first_row,
            rows_per_req=case.rows_per_req,
        )
        return self.buffer

    def check(self) -> None:
        found, expected = self.run().cpu().double(), self.expected()
        assert torch.equal(found == CANARY, expected == CANARY), self.case
        if self.case.integers:
            assert torch.equal(found, expected), self.case
        else:
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=2e-3, msg=lambda m: f"{self.case}: {m}"
            )


def requests(rows_per_req: int, *last: int, **others: object) -> Case:
    """As drafts are verified: `rows_per_req` rows of each request, each one key longer than the last."""
    lengths = [n - rows_per_req + 1 + j for n in last for j in range(rows_per_req)]
    owners = [(5 * r) % len(last) for r in range(len(last))]
    return Case(lengths, table_rows=owners, rows_per_req=rows_per_req, **others)


CASES = [
    Case([0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300]),  # each with a table of its own
    Case([0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300], heads=32),
    Case([7, -3, 99, 13], topk=4, width=13),  # lengths beyond the width
    Case([0, 0], width=0),
    Case([40, 40], topk=64),  # nobody has more
    Case([1, 2, 3], topk=0),
    Case([200], width=1000),  # a table wider than anybody needs
    Case(list(range(100, 120)), table_rows=[0] * 20),  # a prefill
    Case([300] * 7 + [0] * 3 + [50] * 3, table_rows=[3] * 7 + [1] * 3 + [0] * 3),  # of several requests
    Case([300, 20, 280, 18, 260, 40, 77], table_rows=[2, 0, 2, 1, 1, 0, 2]),  # one row of each
    *[requests(r, 300, 30, 0, 129, heads=h) for r in (1, 3, 5) for h in (32, 64)],
    *[requests(r, 150, 200, 17) for r in (2, 4, 6, 7, 8, 9, 10, 11)],
    requests(5, 300, 30, 0, 129, wide=True, gaps=8),
    requests(1, 300, 30, 0, 129, 17),
    Case([131, 132, 133, 134, 135], table_rows=[0, 0, 3, 1], rows_per_req=3, first_row=5),
    Case([131, 132, 133, 134, 135], table_rows=[0, 1, 1, 1, 0, 0, 2, 2, 2, 0], first_row=4),
    Case(list(range(200, 230)), table_rows=[1, 0], rows_per_req=24, first_row=13),
    requests(4, 300, 260, 64, 65, integers=True),
    Case(list(range(250, 280)), table_rows=[0] * 30, integers=True, heads=32, gaps=16),
]
LONG_CASES = [
    requests(5, 7000, 2049, 2052, 30000, topk=2048, width=163840),
    Case([5000 + t for t in range(1000)], topk=2048, width=6016, table_rows=[0] * 1000, wide=True),
    Case([70001, 3], topk=2048, width=70001),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_index_scores(case: Case, device: str) -> None:
    require_served(device)
    Rig(case, device).check()


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_rows(case: Case, cuda: str) -> None:
    require_served(cuda)
    Rig(case, cuda).check()


def require_served(device: str) -> None:
    if not serves_index_scores(torch.device(device), torch.bfloat16, 64, DIM):
        pytest.skip("index_scores needs Hopper")


@pytest.mark.parametrize("heads", [32, 64])
def test_a_score_does_not_depend_on_the_batch(heads: int, device: str) -> None:
    """Bit for bit: rows of a batch, each alone, as a prefill of one request, and at other positions."""
    require_served(device)
    rig = Rig(requests(5, 300, 290, 280, 270, heads=heads, topk=16), device)
    whole = rig.run()[1:-1].clone()
    owners = torch.tensor(rig.case.owners(), dtype=torch.int32, device=device)

    def again(
        rows: slice, table: torch.Tensor, table_rows: torch.Tensor | None, lengths: torch.Tensor
    ) -> torch.Tensor:
        scores = torch.full((len(lengths), table.shape[1] + 20), CANARY, device=device)[
            :, : -(-table.shape[1] // 4) * 4
        ]
        width = table.shape[1]
        index_scores(
            rig.q[rows], rig.weights[rows], rig.keys, table, table_rows, lengths, scores, width=width, topk=16
        )
        return scores

    for t, length in enumerate(rig.case.lengths):
        row, own = slice(t, t + 1), rig.table[owners[t : t + 1].long()]
        alone = again(row, own, None, rig.lengths[row])
        assert torch.equal(alone[0, :length], whole[t, :length])
        moved = again(row, own[:, 37:].contiguous(), None, rig.lengths[row] - 37)
        assert torch.equal(moved[0, : length - 37], whole[t, 37:length])
    prefill = again(slice(None), rig.table, owners, rig.lengths)
    assert torch.equal(prefill, whole[:, : prefill.shape[1]])


@pytest.mark.gpu
def test_captured(cuda: str) -> None:
    """Lengths are read at every replay: the grid serves any of them."""
    require_served(cuda)
    rig = Rig(requests(5, 1000, 1000, 1000, width=1000), cuda)
    rig.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rig.run()
    for last in ((5, 1000, 17), (1000, 1000, 1000), (4, 4, 4), (700, 20, 21)):
        rig.case = replace(rig.case, lengths=requests(5, *last).lengths)
        rig.lengths.copy_(torch.tensor(rig.case.lengths))
        rig.buffer.fill_(CANARY)
        graph.replay()
        expected, found = rig.expected(), rig.buffer.cpu().double()
        assert torch.equal(found == CANARY, expected == CANARY)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize(("value", "score"), [(NAN, 0.0), (-INF, 0.0), (INF, INF)])
def test_products_that_are_no_numbers_count_as_zero(value: float, score: float, device: str) -> None:
    require_served(device)
    rig = Rig(Case([40], integers=True), device)
    rig.keys[rig.table[0, 3].long(), 7] = value
    rig.q[0, :, 7] = 0  # infinity times zero is no number either
    rig.q[0, 5, 7] = rig.weights[0, 5] = 1
    found = rig.run()[1, :40]
    assert found[3].item() == score
    assert found.isfinite().sum() >= 39


def good(device: str) -> dict[str, object]:
    return {
        "q_index": torch.zeros(3, 64, DIM, dtype=torch.bfloat16, device=device),
        "index_weights": torch.zeros(3, 64, device=device),
        "index_k": torch.zeros(20, DIM, dtype=torch.bfloat16, device=device),
        "page_table": torch.zeros(2, 12, dtype=torch.int32, device=device),
        "table_rows": torch.zeros(3, dtype=torch.int64, device=device),
        "lengths": torch.full((3,), 9, dtype=torch.int32, device=device),
        "scores": torch.full((3, 16), CANARY, device=device),
        "width": 10,
        "topk": 4,
    }


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Equal, in rows of 129."""
    return torch.nn.functional.pad(tensor, (0, 1))[..., :-1]


def overlapping(arguments: dict[str, object]) -> dict[str, object]:
    memory = torch.full((3, 80), CANARY, device=arguments["scores"].device)
    return arguments | {"index_weights": memory[:, :64], "scores": memory[:, 60:76]}


REJECTED = [
    reject("dtype", "q_index: expected bfloat16, found float32", change(q_index=lambda q: q.float())),
    reject("keys' dtype", "index_k: expected bfloat16, found float16", change(index_k=lambda k: k.half())),
    reject(
        "weights",
        "index_weights: expected float32, found bfloat16",
        change(index_weights=lambda w: w.bfloat16()),
    ),
    reject("rank", "q_index: expected rank 3, found 2", change(q_index=lambda q: q[0])),
    reject(
        "heads",
        "q_index: expected 32 or 64 heads of 128, found [3, 48, 128]",
        change(q_index=lambda q: q[:, :48]),
    ),
    reject(
        "dims",
        "q_index: expected 32 or 64 heads of 128, found [3, 64, 64]",
        change(q_index=lambda q: q[..., :64]),
    ),
    reject(
        "keys' dims",
        "index_k: expected a shape of at least [0, 128], found [20, 64]",
        change(index_k=lambda k: k[:, :64]),
    ),
    reject(
        "wide keys",
        "index_k: expected rows of 128, found [20, 256]",
        change(index_k=lambda k: k.repeat(1, 2)),
    ),
    reject(
        "rows",
        "index_weights: expected a shape of at least [3, 64], found [2, 64]",
        change(index_weights=lambda w: w[:2]),
    ),
    reject(
        "scores",
        "scores: expected a shape of at least [3, 10], found [2, 16]",
        change(scores=lambda s: s[:2]),
    ),
    reject("width", "page_table: expected a shape of at least [0, 13], found [2, 12]", change(width=13)),
    reject("owner", "table_rows: expected a shape of at least [4], found [3]", change(first_row=1)),
    reject("own tables", "page_table: expected a shape of at least [3, 10], found", change(table_rows=None)),
    reject(
        "lengths", "lengths: expected a shape of at least [3], found [2]", change(lengths=lambda l: l[:2])
    ),
    reject(
        "address", "scores: expected rows that begin at multiples of 16", change(scores=lambda s: s[:, 1:])
    ),
    reject("query", "q_index: expected rows that begin at multiples of 16", change(q_index=unaligned)),
    reject("key", "index_k: expected rows that begin at multiples of 16", change(index_k=unaligned)),
    reject("columns", "index_k: expected an inner stride of 1", change(index_k=lambda k: k.T.contiguous().T)),
    reject("topk", "topk: expected 0 .. 2147483647, found -1", change(topk=-1)),
    reject("rows_per_req", "rows_per_req: expected 1 .. 2147483647, found 0", change(rows_per_req=0)),
    reject(
        "overlap",
        "scores: expected memory apart from every input, found an overlap with index_weights",
        overlapping,
    ),
]


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case: Malformed, device: str) -> None:
    arguments = good(device)
    check(case, "index_scores", lambda: index_scores(**case.change(arguments)), [arguments["scores"]])


def test_nothing_to_do(device: str) -> None:
    arguments = good(device)
    none = {
        name: arguments[name][:0] for name in ("q_index", "index_weights", "lengths", "scores", "table_rows")
    }
    index_scores(**arguments | none)
    index_scores(**arguments | {"width": 0})
    assert (arguments["scores"] == CANARY).all()


@pytest.mark.parametrize(
    ("dtype", "heads", "dim", "served"),
    [
        (torch.bfloat16, 64, 128, True),
        (torch.bfloat16, 32, 128, True),
        (torch.float32, 64, 128, False),
        (torch.bfloat16, 16, 128, False),
        (torch.bfloat16, 64, 64, False),
    ],
)
def test_what_is_served(dtype: torch.dtype, heads: int, dim: int, served: bool, device: str) -> None:
    hopper = device == "cpu" or torch.cuda.get_device_capability() == (9, 0)
    assert serves_index_scores(torch.device(device), dtype, heads, dim) is (served and hopper)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_products_are_not_serialized(tmp_path: Path) -> None:
    """Where the compiler cannot tell that registers are free it waits for each product, and says so."""
    kernel = "template __global__ void index_scores_kernel<64, 5>(const __grid_constant__ IndexScoresParams, "
    source = tmp_path / "kernel.cu"
    source.write_text(
        '#include "attention/index_scores.cuh"\nnamespace sgl_kernel {\n'
        f"{kernel}const __grid_constant__ RowBlocks);\n}}\n"
    )
    command = [
        "nvcc",
        "-std=c++17",
        "-gencode",
        "arch=compute_90a,code=sm_90a",
        "-Xptxas",
        "--warn-on-spills",
    ]
    csrc = Path(__file__).resolve().parent.parent / "csrc"
    done = subprocess.run(
        [*command, "-cubin", "-I", csrc, "-o", tmp_path / "kernel.cubin", source],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unknown_device_has_no_library() -> None:
    with pytest.raises(RuntimeError, match="device type: expected one of cpu, cuda, found meta"):
        serves_index_scores(torch.device("meta"), torch.bfloat16, 64, 128)
