"""Indexer and sparse MLA: every implementation against a plain one, with poison wherever none may read.

The Triton kernels run on a GPU (`-m gpu`), or on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from sglang.srt.layers.attention.nsa import indexer, sparse_mla
from sglang.srt.layers.attention.nsa.indexer import topk_by_position
from sglang.srt.layers.attention.sparse_mla_flashmla import side_by_side, zero_dead_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = {"torch": "cpu", "torch_cuda": "cuda", "triton": "cpu" if INTERPRETED else "cuda"}
IMPLEMENTATIONS = [
    "torch",
    pytest.param("torch_cuda", marks=pytest.mark.gpu),
    pytest.param("triton", marks=[] if INTERPRETED else pytest.mark.gpu),
]


@dataclass(frozen=True)
class Implementation:
    """The two functions under test, and where to run them."""

    select_topk: Callable[..., torch.Tensor]
    sparse_mla: Callable[..., torch.Tensor]
    device: str


def implementation(name: str, dtype: torch.dtype = torch.float32) -> Implementation:
    if name != "triton":
        return Implementation(indexer.select_topk, sparse_mla.sparse_mla, DEVICE[name])
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as if its bits were integers")
    from sglang.srt.layers.attention.nsa import indexer_triton, sparse_mla_triton

    return Implementation(indexer_triton.select_topk, sparse_mla_triton.sparse_mla, DEVICE[name])


@dataclass(frozen=True)
class SelectCase:
    """Rows of `lengths`; with `table_rows` some rows share a page table row."""

    name: str
    lengths: list[int]
    topk: int = 16
    heads: int = 4
    dim: int = 32
    columns: int = 80
    table_rows: list[int] | None = None
    dtype: torch.dtype = torch.float32
    values: int = 4  # integers of -values..values: every sum is exact, and ties abound
    seed: int = 0


SELECT_CASES = [
    SelectCase("around_topk", [0, 1, 15, 16, 17, 33, 79, 80]),
    SelectCase("bfloat16", [5, 40, 80, 64], dtype=torch.bfloat16),
    SelectCase("all_scores_equal", [0, 20, 80], values=0),
    SelectCase("mostly_ties", [70, 80, 31], values=1, heads=2, dim=16),
    SelectCase(
        "prefill_of_three",
        [*range(1, 25), *range(1, 4), *range(30, 45)],
        table_rows=[2] * 24 + [0] * 3 + [1] * 15,
    ),
    SelectCase("padding_rows", [1, 1, 1, 1], table_rows=[0, 0, 0, 0]),
    SelectCase("topk_wider_than_table", [3, 9, 0], topk=64, columns=9),
    SelectCase("odd_sizes", [7, 50, 77], topk=13, heads=5, dim=24, columns=77),
    SelectCase("topk_1", [1, 2, 60], topk=1),
    SelectCase("long_row", [300, 2, 299], topk=128, columns=301, heads=2, dim=16),
]

LARGE_SELECT_CASES = [
    SelectCase("deepseek", [1, 2048, 2049, 5000, 9000], 2048, 64, 128, 9001, dtype=torch.bfloat16),
    SelectCase("deepseek_float32", [2049, 6000], 2048, 64, 128, 6000),
    SelectCase("128k", [131072, 4, 70000], 2048, 64, 128, 131072, dtype=torch.bfloat16, values=8),
]


@dataclass(frozen=True)
class SelectInputs:
    q: torch.Tensor
    weights: torch.Tensor
    keys: torch.Tensor
    page_table: torch.Tensor
    table_rows: torch.Tensor | None
    lengths: torch.Tensor

    def on(self, device: str) -> tuple:
        return tuple(None if t is None else t.to(device) for t in vars(self).values())


def select_inputs(case: SelectCase) -> SelectInputs:
    """Integer-valued inputs. Dead columns hold absurd slots, unused slots (slot 0 too) hold NaN."""
    g = torch.Generator().manual_seed(case.seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-case.values, case.values + 1, shape, generator=g).to(case.dtype)

    rows = len(case.lengths)
    owners = case.table_rows or list(range(rows))
    live = [0] * (max(owners) + 1)
    for owner, length in zip(owners, case.lengths):
        live[owner] = max(live[owner], length)
    page_table = torch.where(torch.rand(len(live), case.columns, generator=g) < 0.5, -7, 2**31 - 1).int()
    slots = torch.randperm(sum(live) + 40, generator=g) + 1
    keys = torch.full((len(slots) + 1, case.dim), float("nan"), dtype=case.dtype)
    start = 0
    for owner, length in enumerate(live):
        own = slots[start : start + length]
        page_table[owner, :length] = own.int()
        keys[own] = integers(length, case.dim)
        start += length
    q = integers(rows, case.heads, case.dim)
    weights = torch.randint(-2, 3, (rows, case.heads), generator=g).float()
    table_rows = None if case.table_rows is None else torch.tensor(case.table_rows)
    return SelectInputs(q, weights, keys, page_table, table_rows, torch.tensor(case.lengths).int())


def plain_select(inputs: SelectInputs, topk: int) -> torch.Tensor:
    """Row by row, with a sort whose key says everything: higher score first, then lower position."""
    out = torch.full((len(inputs.lengths), topk), -1, dtype=torch.int32)
    for t, length in enumerate(inputs.lengths.tolist()):
        table = inputs.page_table[t if inputs.table_rows is None else inputs.table_rows[t]]
        keys = inputs.keys[table[:length].long()].double()
        scores = ((inputs.q[t].double() @ keys.T).clamp(min=0) * inputs.weights[t, :, None].double()).sum(0)
        best = sorted(range(length), key=lambda p: (-scores[p].item(), p))[:topk]
        out[t, : len(best)] = table[sorted(best)]
    return out


def check_select(case: SelectCase, name: str) -> None:
    ops = implementation(name, case.dtype)
    inputs = select_inputs(case)
    for width in {max([1, *case.lengths]), case.columns}:
        slots = ops.select_topk(*inputs.on(ops.device), case.topk, width)
        assert slots.dtype == torch.int32
        assert torch.equal(slots.cpu(), plain_select(inputs, case.topk))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SELECT_CASES, ids=lambda case: case.name)
def test_select_topk(case: SelectCase, name: str) -> None:
    check_select(case, name)


@dataclass(frozen=True)
class IndirectCase:
    """Requests with `rows_per_req` rows each; `lengths` are those of all rows."""

    rows_per_req: int
    requests: list[int]
    lengths: list[int]
    topk: int = 16
    dtype: torch.dtype = torch.int32  # of the requests
    padding_slot: int = -1


INDIRECT_CASES = [
    IndirectCase(1, [5, 2, 7, 0], [70, 3, 17, 1]),
    IndirectCase(1, [3, 3], [80, 16], dtype=torch.int64),  # two rows may read one request
    IndirectCase(4, [6, 1], [30, 31, 32, 33, 1, 2, 3, 4], padding_slot=0),
    IndirectCase(3, [2, 5, 0], [77, 78, 79, 0, 0, 0, 1, 0, 0], topk=100),
]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", INDIRECT_CASES, ids=str)
def test_slots_are_the_same_through_req_to_token(
    case: IndirectCase, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token table and each request's index instead of a page table with a row for every row."""
    ops = implementation(name)
    g = torch.Generator().manual_seed(1)
    rows, columns = len(case.lengths), 80
    req_to_token = (torch.randperm(8 * columns, generator=g) + 1).view(8, columns).int().to(ops.device)
    requests = torch.tensor(case.requests, dtype=case.dtype, device=ops.device)
    q = torch.randn((rows, 4, 32), generator=g).to(ops.device)
    weights = torch.randn((rows, 4), generator=g).to(ops.device)
    keys = torch.randn((8 * columns + 1, 32), generator=g).to(ops.device)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=ops.device)
    page_table = req_to_token[requests.long().repeat_interleave(case.rows_per_req)]
    tail = lengths, case.topk, columns
    for chunk_elements in (None, 300):  # in one go, and in chunks that divide a request's rows
        if chunk_elements:
            monkeypatch.setitem(ops.select_topk.__globals__, "CHUNK_ELEMENTS", chunk_elements)
        direct = ops.select_topk(q, weights, keys, page_table, None, *tail, padding_slot=case.padding_slot)
        indirect = ops.select_topk(
            *(q, weights, keys, req_to_token, requests, *tail),
            rows_per_req=case.rows_per_req,
            padding_slot=case.padding_slot,
        )
        assert torch.equal(direct, indirect)
    live = torch.arange(case.topk, device=ops.device) < lengths[:, None]
    assert (direct[live] > 0).all()
    assert (direct[~live] == case.padding_slot).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("lengths", "topk"), [([1, 2, 3, 7, 8], 8), ([5, 80], 96), ([0], 1)], ids=str)
def test_all_slots_are_what_is_selected_where_nobody_has_more(
    lengths: list[int], topk: int, name: str
) -> None:
    ops = implementation(name)
    inputs = select_inputs(SelectCase("", lengths, topk, table_rows=[1] * len(lengths))).on(ops.device)
    selected = ops.select_topk(*inputs, topk, max(lengths), padding_slot=3)
    assert torch.equal(indexer.all_slots(*inputs[3:], topk, padding_slot=3), selected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE_SELECT_CASES, ids=lambda case: case.name)
def test_select_topk_at_deepseeks_size(case: SelectCase) -> None:
    check_select(case, "triton")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_select_topk_in_chunks_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = implementation(name)
    monkeypatch.setitem(ops.select_topk.__globals__, "CHUNK_ELEMENTS", 200)
    for case in SELECT_CASES[:1] + SELECT_CASES[4:5]:
        check_select(case, name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS[-1:])
@pytest.mark.parametrize("tile", [32, 128])
def test_select_topk_of_rows_that_fit_no_tile(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths around a tile and its half: of those above it the k-th score is found another way."""
    from sglang.srt.layers.attention.nsa import indexer_triton

    monkeypatch.setattr(indexer_triton, "TOPK_TILE", tile)
    monkeypatch.setattr(indexer_triton, "TOPK_BLOCK", 64)
    lengths = [17, tile // 2, tile // 2 + 1, tile - 1, tile, tile + 1, 300]
    for values in (0, 1, 4):
        check_select(SelectCase("tiles", lengths, columns=300, heads=2, dim=16, values=values), name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_select_topk_without_rows_or_columns(name: str) -> None:
    ops = implementation(name)
    inputs = select_inputs(SelectCase("", [0, 0], columns=5)).on(ops.device)
    assert (ops.select_topk(*inputs, 3, 0) == -1).all()
    none = [t if t is None or i == 2 else t[:0] for i, t in enumerate(inputs)]
    assert ops.select_topk(*none, 3, 5).shape == (0, 3)


def test_topk_by_position_orders_every_float() -> None:
    inf = float("inf")
    scores = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, 3.5, -3.5, inf, -inf, 3.5, 3.4e38, -3.4e38, 0.0]])
    assert topk_by_position(scores, 12).tolist() == [[6, 9, 4, 8, 2, 0, 1, 11, 3, 5, 10, 7]]


@dataclass(frozen=True)
class AttendCase:
    """`live[t]` slots for row t, spread over the topk columns in `spread` rows and packed in the others."""

    name: str
    live: list[int]
    topk: int = 32
    heads: int = 8
    latent: int = 64
    rope: int = 16
    dtype: torch.dtype = torch.float32
    spread: bool = False


ATTEND_CASES = [
    AttendCase("packed", [0, 1, 31, 32, 5]),
    AttendCase("holes_anywhere", [0, 1, 9, 30, 32], spread=True),
    AttendCase("bfloat16", [0, 3, 32, 17], dtype=torch.bfloat16),
    AttendCase("odd_sizes", [13, 2], topk=13, heads=5, latent=24, rope=6),
    AttendCase("split_over_slots", [512, 3, 300, 0], topk=512, heads=4, spread=True),
    AttendCase("many_heads", [20, 32], heads=40),
    AttendCase("no_slot_at_all", [0, 0]),
]

LARGE_ATTEND_CASES = [
    AttendCase("deepseek", [2048, 1, 700, 0, 2047], 2048, 128, 512, 64, torch.bfloat16),
    AttendCase("deepseek_float32", [2048, 5], 2048, 128, 512, 64),
    AttendCase("half_the_heads", [2048, 700, 0], 2048, 64, 512, 64, torch.bfloat16),
    AttendCase("odd_heads", [100, 640, 3] * 40, 640, 100, 512, 64, torch.bfloat16, spread=True),
    AttendCase("few_heads", [2048, 1, 64], 2048, 16, 512, 64, torch.bfloat16),
    AttendCase("odd_latent", [300, 512], 512, 128, 448, 64, torch.bfloat16),
    AttendCase("deepseek_many_rows", [2048] * 150, 2048, 128, 512, 64, torch.bfloat16, spread=True),
]


def attend_inputs(case: AttendCase) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    rows, count = len(case.live), max([1, *case.live])
    dim = case.latent + case.rope
    kv = torch.full((2 * count + 1, dim), float("nan"), dtype=case.dtype)
    used = torch.randperm(2 * count, generator=g)[:count] + 1  # never slot 0
    kv[used] = torch.randn(count, dim, generator=g).to(case.dtype)
    slots = torch.full((rows, case.topk), -1, dtype=torch.int32)
    for t, live in enumerate(case.live):
        columns = torch.randperm(case.topk, generator=g)[:live] if case.spread else torch.arange(live)
        slots[t, columns] = used[torch.randperm(count, generator=g)[:live]].int()
    # As the model hands it over: heads first in memory.
    q_nope = torch.randn(case.heads, rows, case.latent, generator=g).to(case.dtype).transpose(0, 1)
    q_rope = torch.randn(rows, case.heads, case.rope, generator=g).to(case.dtype)
    return q_nope, q_rope, kv, slots


def plain_attend(q_nope, q_rope, kv, slots, scale: float) -> torch.Tensor:
    out = torch.zeros(q_nope.shape, dtype=torch.float64)
    latent = q_nope.shape[-1]
    for t in range(len(slots)):
        rows = kv[slots[t][slots[t] >= 0].long()].double()
        if len(rows):
            q = torch.cat((q_nope[t], q_rope[t]), dim=-1).double()
            out[t] = (q @ rows.T * scale).softmax(-1) @ rows[:, :latent]
    return out


def check_attend(case: AttendCase, name: str) -> None:
    ops = implementation(name, case.dtype)
    inputs = attend_inputs(case)
    out = ops.sparse_mla(*(t.to(ops.device) for t in inputs), 0.17).cpu()
    assert out.dtype == case.dtype
    expected = plain_attend(*inputs, 0.17)
    tolerance = 5e-5 if case.dtype == torch.float32 else 2e-2  # float32: sums of up to 2048 terms
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for t, live in enumerate(case.live):
        assert live or torch.equal(out[t], torch.zeros_like(out[t]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ATTEND_CASES, ids=lambda case: case.name)
def test_sparse_mla(case: AttendCase, name: str) -> None:
    check_attend(case, name)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the large cases take this way")
@pytest.mark.parametrize("heads", [16, 20])
def test_sparse_mla_with_latents_in_two_parts(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What many heads of DeepSeek's size need, on a small model: each program mixes half of the latents."""
    from sglang.srt.layers.attention.nsa import sparse_mla_triton

    tile = sparse_mla_triton.Tile(heads=16, slots=16, latents=64, parts=2, warps=4, stages=1)
    monkeypatch.setattr(sparse_mla_triton.Tile, "choose", lambda *_: tile)
    check_attend(AttendCase("packed", [0, 1, 31, 32, 5], heads=heads), "triton")
    check_attend(AttendCase("split", [512, 3, 300, 0], topk=512, heads=heads, spread=True), "triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("heads", "latent", "shared", "expected"),
    [
        (128, 512, 227 << 10, (128, 64, 2, 1)),
        (64, 512, 227 << 10, (64, 64, 1, 2)),
        (128, 448, 227 << 10, (64, 64, 1, 2)),
        (128, 512, 163 << 10, (32, 32, 1, 2)),  # A100
        (128, 512, 99 << 10, (16, 32, 1, 1)),  # cards for desktops
        (16, 512, 99 << 10, (16, 32, 1, 2)),
        (8, 64, 99 << 10, (16, 32, 1, 2)),
        (40, 64, 99 << 10, (32, 32, 1, 2)),
    ],
)
def test_a_tile_fits_the_device(heads: int, latent: int, shared: int, expected: tuple[int, ...]) -> None:
    from sglang.srt.layers.attention.nsa.sparse_mla_triton import Tile

    tile = Tile.choose(heads, latent, 64, torch.bfloat16, shared)
    assert (tile.heads, tile.slots, tile.parts, tile.stages) == expected
    assert tile.shared_bytes(tile.latents + 64) <= shared


def test_queries_that_lie_side_by_side_are_not_copied() -> None:
    q = torch.randn(3, 4, 576)
    for q_nope, q_rope, together in (
        (q[..., :512], q[..., 512:], True),
        (q[..., :512].clone(), q[..., 512:], False),
        (q[:, :2, :512], q[:, :2, 512:], False),  # not all heads: rows do not follow each other
    ):
        joined = side_by_side(q_nope, q_rope)
        assert torch.equal(joined, torch.cat((q_nope, q_rope), dim=-1)) and joined.is_contiguous()
        assert (joined.data_ptr() == q.data_ptr()) == together


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_without_a_slot_become_zeros_where_they_lie(device: str) -> None:
    slots = torch.tensor([[3, -1], [-1, -1], [1, 2], [-1, -1]], dtype=torch.int32, device=device)
    padded = torch.full((4, 6, 40), float("nan"), device=device)  # two heads more than the model's
    out = padded[:, :4]
    out[0], out[2] = 1.0, 2.0
    assert zero_dead_rows(out, slots) is out
    assert out[:, 0, 0].tolist() == [1.0, 0.0, 2.0, 0.0] and not out[1].any() and not out[3].any()
    assert padded[:, 4:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE_ATTEND_CASES, ids=lambda case: case.name)
def test_sparse_mla_at_deepseeks_size(case: AttendCase) -> None:
    check_attend(case, "triton")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_sparse_mla_without_rows(name: str) -> None:
    ops = implementation(name)
    q_nope, q_rope, kv, slots = (t.to(ops.device) for t in attend_inputs(ATTEND_CASES[0]))
    assert ops.sparse_mla(q_nope[:0], q_rope[:0], kv, slots[:0], 1.0).shape == (0, 8, 64)


def test_sparse_mla_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_mla, "CHUNK_ELEMENTS", 3000)
    for case in ATTEND_CASES[:2]:
        check_attend(case, "torch")


def test_extreme_scores_do_not_overflow() -> None:
    q_nope, q_rope, kv, slots = attend_inputs(ATTEND_CASES[0])
    out = sparse_mla.sparse_mla(q_nope * 1e4, q_rope * 1e4, kv, slots, 10.0)
    assert out.isfinite().all()


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_with_lengths_changed_between_replays() -> None:
    """One capture serves rows that grow, shrink and go idle; nothing waits for the host."""
    ops = implementation("triton")
    device = ops.device
    lengths_of_replays = [[1, 1, 1, 1], [80, 17, 3, 0], [16, 80, 1, 1], [0, 0, 0, 0], [80, 80, 80, 80]]
    static = select_inputs(SelectCase("", [80, 80, 80, 80])).on(device)
    generator = torch.Generator(device).manual_seed(0)
    q_nope = torch.randn(4, 8, 64, device=device, generator=generator)
    q_rope = torch.randn(4, 8, 16, device=device, generator=generator)
    kv = torch.randn(static[2].shape[0], 80, device=device, generator=generator)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        slots = ops.select_topk(*static, 16, 80)
        return slots, ops.sparse_mla(q_nope, q_rope, kv, slots, 0.2)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots, out = step()
    for lengths in lengths_of_replays:
        static[5].copy_(torch.tensor(lengths).int())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected_slots = indexer.select_topk(*(None if t is None else t.cpu() for t in static), 16, 80)
        assert torch.equal(slots.cpu(), expected_slots)
        expected = sparse_mla.sparse_mla(q_nope.cpu(), q_rope.cpu(), kv.cpu(), expected_slots, 0.2)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)
