"""Sparse MLA: every implementation against a plain one, with poison wherever none may read; and it with the
indexer in a captured graph."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import pytest
import torch
from nsa_implementations import (
    IMPLEMENTATIONS,
    INTERPRETED,
    SelectCase,
    implementation,
    select_inputs,
)
from sglang.srt.layers.attention.nsa import indexer, sparse_mla
from sglang.srt.layers.attention.sparse_mla_flashmla import side_by_side, zero_dead_rows


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
    ("rows", "heads", "latent", "shared", "expected"),
    [
        (5, 128, 512, 227 << 10, (128, 64, 2, 1)),
        (133, 128, 512, 227 << 10, (64, 64, 1, 2)),  # enough rows to fill the device
        (5, 64, 512, 227 << 10, (64, 64, 1, 2)),
        (5, 128, 448, 227 << 10, (64, 64, 1, 2)),
        (5, 128, 512, 163 << 10, (32, 32, 1, 2)),  # A100
        (5, 128, 512, 99 << 10, (16, 32, 1, 1)),  # cards for desktops
        (1, 128, 512, 227 << 10, (16, 64, 1, 1)),
        (2, 64, 512, 99 << 10, (16, 64, 1, 1)),
        (1, 16, 512, 99 << 10, (16, 32, 1, 2)),
        (5, 8, 64, 99 << 10, (16, 32, 1, 2)),
        (1, 40, 64, 99 << 10, (32, 32, 1, 2)),
    ],
)
def test_a_tile_fits_the_device(
    rows: int, heads: int, latent: int, shared: int, expected: tuple[int, ...]
) -> None:
    from sglang.srt.layers.attention.nsa.sparse_mla_triton import Tile

    tile = Tile.choose(rows, heads, latent, 64, torch.bfloat16, shared)
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
