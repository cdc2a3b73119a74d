"""The indexer: every implementation against a plain one, with poison wherever none may read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from nsa_implementations import (
    DEVICE,
    IMPLEMENTATIONS,
    INTERPRETED,
    SelectCase,
    SelectInputs,
    implementation,
    select_inputs,
)
from sglang.srt.layers.attention.nsa import indexer
from sglang.srt.layers.attention.nsa.indexer import topk_by_position

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


def check_select(case: SelectCase, name: str, select_topk: Callable[..., torch.Tensor] | None = None) -> None:
    ops = implementation(name, case.dtype)
    check_selection(case, select_topk or ops.select_topk, ops.device)


def check_selection(case: SelectCase, select_topk: Callable[..., torch.Tensor], device: str) -> None:
    inputs = select_inputs(case)
    for width in {max([1, *case.lengths]), case.columns}:
        slots = select_topk(*inputs.on(device), case.topk, width)
        assert slots.dtype == torch.int32
        assert torch.equal(slots.cpu(), plain_select(inputs, case.topk))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SELECT_CASES, ids=lambda case: case.name)
def test_select_topk(case: SelectCase, name: str) -> None:
    check_select(case, name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS[-1:])
@pytest.mark.parametrize(
    "case",
    [*SELECT_CASES, *(pytest.param(case, marks=pytest.mark.gpu) for case in LARGE_SELECT_CASES)],
    ids=lambda case: case.name,
)
def test_select_topk_with_the_kernel_library(case: SelectCase, name: str) -> None:
    """What a server selects with: the library's top-k, and its scores of the sizes that they serve."""
    from sglang.srt.layers.attention.registry import triton_indexer

    select_topk = triton_indexer(torch.device(DEVICE[name]))
    assert select_topk is not implementation(name).select_topk
    if INTERPRETED and case in LARGE_SELECT_CASES:
        pytest.skip("too large for Triton's interpreter")
    check_select(case, name, select_topk)


LIBRARY_CASES = [
    SelectCase("around_topk", [0, 15, 16, 17, 64, 65, 80], heads=64, dim=128, dtype=torch.bfloat16),
    SelectCase("32 heads", [80, 3, 40], heads=32, dim=128, dtype=torch.bfloat16, values=1),
    SelectCase(
        "prefill_of_two",
        [*range(30, 40), *range(1, 20)],
        *(16, 64, 128, 80),
        table_rows=[1] * 10 + [0] * 19,
        dtype=torch.bfloat16,
    ),
]


@pytest.mark.parametrize("case", LIBRARY_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", IMPLEMENTATIONS[-1:])
@pytest.mark.parametrize("chunk_elements", [1 << 26, 200])
def test_select_topk_of_the_sizes_that_the_kernel_library_serves(
    chunk_elements: int, name: str, case: SelectCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel of Triton's is launched."""
    from sgl_kernel import serves_index_scores
    from sglang.srt.layers.attention.nsa import index_scores_triton, indexer_triton, topk_triton
    from sglang.srt.layers.attention.registry import triton_indexer

    device = torch.device(DEVICE[name])
    if not serves_index_scores(device, case.dtype, case.heads, case.dim):
        pytest.skip(f"the library's index scores need Hopper, not {device}")
    monkeypatch.setattr(index_scores_triton, "index_scores", None)
    monkeypatch.setattr(topk_triton, "topk_slots", None)
    monkeypatch.setattr(indexer_triton, "CHUNK_ELEMENTS", chunk_elements)
    check_selection(case, triton_indexer(device), DEVICE[name])


@pytest.mark.parametrize("name", IMPLEMENTATIONS[-1:])
def test_the_choice_of_index_scores_is_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    from sgl_kernel import serves_index_scores
    from sglang.srt.layers.attention import registry

    device = torch.device(DEVICE[name])
    served = serves_index_scores(device, torch.bfloat16, 64, 128)
    with caplog.at_level("INFO", registry.__name__):
        registry.triton_indexer.__wrapped__(device)
    assert f"index scores: {'the kernel library' if served else 'Triton'}'s" in caplog.text


@pytest.mark.parametrize("name", IMPLEMENTATIONS[-1:])
def test_without_the_kernel_library_scores_and_topk_are_tritons(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.layers.attention import registry
    from sglang.srt.layers.attention.nsa import kernels

    def missing(device_type: str) -> None:
        raise ImportError(f"no library for {device_type}")

    monkeypatch.setattr(kernels, "load_kernels", missing)
    select_topk = registry.triton_indexer.__wrapped__(torch.device(DEVICE[name]))
    assert select_topk is implementation(name).select_topk
    assert f"no library for {DEVICE[name]}" in caplog.text


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
    from sglang.srt.layers.attention.nsa.topk_triton import TopkTile

    monkeypatch.setattr(TopkTile, "choose", classmethod(lambda cls, rows: cls(tile, block=64, warps=4)))
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
