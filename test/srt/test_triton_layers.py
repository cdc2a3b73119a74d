"""The fused layers' kernels against the plain layers: on a GPU (`-m gpu`), or in Triton's interpreter
(TRITON_INTERPRET=1), where a whole engine runs with them, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sglang.srt.layers.rotary import apply_rotary_half, apply_rotary_interleaved
from sglang.srt.layers.triton_kernels import INTERPRETED
from sglang.srt.speculative.eagle_info import count_accepted

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2}}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def rotations(rows: int, rope: int) -> torch.Tensor:
    angles = randn(rows, 1, rope // 2)
    return torch.complex(angles.cos(), angles.sin())


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 256), (5, 48), (3, 1000), (0, 64)])
def test_add_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    from sglang.srt.layers.triton_kernels.add_norm import add_norm

    x, delta, weight = (
        randn(rows, size, dtype=dtype),
        randn(rows, size, dtype=dtype, seed=1),
        randn(size, dtype=dtype),
    )
    normed, total = add_norm(x, delta, weight, 1e-6)
    # The interpreter cuts bfloat16 off instead of rounding it.
    exact = dtype == torch.float32 or not INTERPRETED
    torch.testing.assert_close(total, x + delta, **({"rtol": 0, "atol": 0} if exact else TOLERANCES[dtype]))
    torch.testing.assert_close(normed, rms_norm(x + delta, weight, 1e-6), **TOLERANCES[dtype])
    alone, same = add_norm(x, None, weight, 1e-6)
    assert same is x
    torch.testing.assert_close(alone, rms_norm(x, weight, 1e-6), **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize("sizes", [(24, 32, 8, 16), (128, 64, 16, 32), (50, 20, 4, 4)], ids=str)
def test_write_latents(sizes: tuple[int, int, int, int], by_slot: bool, dtype: torch.dtype) -> None:
    from sglang.srt.layers.triton_kernels.latents import write_latents

    q_size, latent, rope, index_dim = sizes
    rows, slots = 5, torch.tensor([3, 0, 7, 6, 2], device=DEVICE)
    projected = randn(rows, sum(sizes), dtype=dtype)
    q_w, kv_w, k_w, k_b = (randn(n, dtype=dtype) for n in (q_size, latent, index_dim, index_dim))
    rotation = rotations(rows, rope)
    kv = torch.zeros((9 if by_slot else rows, latent + rope), dtype=dtype, device=DEVICE)
    index_k = torch.zeros((9, index_dim), dtype=dtype, device=DEVICE)
    x, matrix = randn(rows, 40, dtype=dtype), randn(6, 40)
    arguments = (
        projected,
        rotation,
        slots,
        (q_w, 1e-6),
        (kv_w, 1e-6),
        (k_w, k_b, 1e-6),
        kv,
        index_k,
        by_slot,
    )
    q, weights = write_latents(*arguments, index_product=(x, matrix, 0.5) if by_slot else None)
    if by_slot:
        torch.testing.assert_close(weights, F.linear(x.float(), matrix) * 0.5, rtol=1e-4, atol=1e-4)
    else:
        assert weights is None

    q_in, kv_in, rope_in, index_in = projected.split(sizes, dim=1)
    close = TOLERANCES[dtype]
    torch.testing.assert_close(q, rms_norm(q_in, q_w, 1e-6), **close)
    at = slots if by_slot else torch.arange(rows, device=DEVICE)
    torch.testing.assert_close(kv[at, :latent], rms_norm(kv_in, kv_w, 1e-6), **close)
    rotated = apply_rotary_interleaved(rope_in[:, None], rotation).squeeze(1)
    torch.testing.assert_close(kv[at, latent:], rotated, **close)
    normed = F.layer_norm(index_in.float(), (index_dim,), k_w.float(), k_b.float(), 1e-6).to(dtype)
    keys = apply_rotary_half(normed[:, None], rotation).squeeze(1)
    torch.testing.assert_close(index_k[slots], keys, **close)
    assert not index_k[[1, 4, 5, 8]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_heads", [0, 3, 16])
@pytest.mark.parametrize(("rows", "latent"), [(4, 0), (4, 24), (19, 300)])
def test_rotate_and_absorb_queries(rows: int, latent: int, index_heads: int, dtype: torch.dtype) -> None:
    """Without latents the rotations alone."""
    if latent and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot multiply bfloat16 matrices")
    from sglang.srt.layers.triton_kernels.absorb_queries import absorb_queries
    from sglang.srt.layers.triton_kernels.rotate_queries import rotate_queries

    heads, nope, rope, index_dim = 11, 6, 8, 20
    sizes = (heads * (nope + rope), index_heads * index_dim)
    projected = randn(rows, sum(sizes), dtype=dtype)
    expected, expected_index = (
        part.clone().unflatten(1, (-1, n)) for part, n in zip(projected.split(sizes, 1), (14, 20))
    )
    q, q_index = (part.unflatten(1, (-1, n)) for part, n in zip(projected.split(sizes, 1), (14, 20)))
    rotation = rotations(rows, rope)
    q_nope, q_rope = torch.empty((rows, heads, latent + rope), dtype=dtype, device=DEVICE).split(
        (latent, rope), 2
    )
    queries = q_rope, q_index if index_heads else None, rotation
    if latent:
        w_uk = randn(heads, nope + 5, latent, dtype=dtype)[:, :nope]
        absorb_queries(q, w_uk, q_nope, *queries)
        product = torch.einsum("thn,hnc->thc", expected[..., :nope].float(), w_uk.float()).to(dtype)
        torch.testing.assert_close(q_nope, product, **TOLERANCES[dtype])
    else:
        rotate_queries(q, *queries)
    assert torch.equal(q, expected)
    rotated = apply_rotary_interleaved(expected[..., nope:], rotation)
    torch.testing.assert_close(q_rope, rotated, **TOLERANCES[dtype])
    if index_heads:
        torch.testing.assert_close(q_index, apply_rotary_half(expected_index, rotation), **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "size"), [(1, 8, 48), (5, 7, 1500), (65, 4, 20), (0, 3, 8)])
def test_small_linear(rows: int, outputs: int, size: int, dtype: torch.dtype) -> None:
    from sglang.srt.layers.triton_kernels.small_linear import small_linear

    x, weight = randn(rows, size, dtype=dtype), randn(outputs, size)
    torch.testing.assert_close(
        small_linear(x, weight, 0.25), F.linear(x.float(), weight) * 0.25, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    ("rows", "heads", "outputs", "size"), [(1, 1, 240, 256), (5, 3, 7, 100), (16, 1, 4160, 64), (0, 1, 3, 8)]
)
def test_multiply_few_rows(
    rows: int, heads: int, outputs: int, size: int, splits: int, dtype: torch.dtype, monkeypatch: Any
) -> None:
    from sglang.srt.layers.triton_kernels import few_rows

    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot multiply bfloat16 matrices")
    blocks = replace(few_rows.Blocks.choose(heads, outputs, size, dtype), splits=splits)
    monkeypatch.setattr(few_rows.Blocks, "choose", lambda *_: blocks)
    x = randn(rows, heads, size + 8, dtype=dtype)[..., :size]
    weight = randn(heads, outputs, size, dtype=dtype) * size**-0.5
    expected = torch.einsum("thk,hnk->thn", x.float(), weight.float()).to(dtype)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else TOLERANCES[dtype]
    torch.testing.assert_close(few_rows.multiply_few_rows(x, weight), expected, **close)


@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "topk"), [(8, 4, 2, 3), (4, 1, 1, 2), (256, 8, 4, 8), (12, 3, 3, 5)]
)
@pytest.mark.parametrize("normalise", [True, False])
def test_route(experts: int, groups: int, top_groups: int, topk: int, normalise: bool) -> None:
    from sglang.srt.layers.moe import RoutingRule, choose_experts
    from sglang.srt.layers.triton_kernels.route import route

    logits, bias = randn(33, experts), 0.1 * randn(experts)
    rule = RoutingRule(groups, top_groups, topk, normalise, 2.5)
    found_weights, found = route(logits, bias, rule)
    weights, expected = choose_experts(logits, bias, rule)
    order = expected.argsort(dim=1)
    assert torch.equal(found, expected.gather(1, order))
    torch.testing.assert_close(found_weights, weights.gather(1, order))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 3000), (0, 8)], ids=str)
def test_silu_and_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from sglang.srt.layers.triton_kernels.silu_and_mul import silu_and_mul

    x = randn(*shape, dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(silu_and_mul(x), F.silu(gate) * up, **TOLERANCES[dtype])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("accepted", [None, [1, 0, 3]])
def test_step_rows(rows: int, accepted: list[int] | None) -> None:
    from sglang.srt.layers.triton_kernels.step_rows import step_rows

    requests = torch.tensor([4, 0, 2], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([17, 1, 30], dtype=torch.int32, device=DEVICE)
    table = torch.randint(0, 1 << 20, (6, 40), dtype=torch.int32).to(DEVICE)
    angles = rotations(40, 6).squeeze(1)
    accept_lens = None if accepted is None else torch.tensor(accepted, dtype=torch.int32, device=DEVICE)
    positions, slots, rotation = step_rows(requests, lengths, table, angles, rows, accept_lens)
    numbers = torch.arange(rows, device=DEVICE)
    expected = lengths.long()[:, None] + numbers
    assert torch.equal(positions, expected)
    counts = 1 if accept_lens is None else numbers < accept_lens[:, None]
    assert torch.equal(slots, table[requests.long()[:, None], expected].long() * counts)
    assert torch.equal(rotation, angles[expected][:, :, None])


@pytest.mark.parametrize("rows", [1, 2, 5, 10])
def test_accept(rows: int) -> None:
    from sglang.srt.layers.triton_kernels.accept import accept

    bs = 64
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, 2, (bs, rows), generator=generator).to(DEVICE)
    drafts = torch.randint(0, 2, (bs, rows - 1), generator=generator).to(DEVICE)
    requests = torch.randperm(bs, generator=generator).int().to(DEVICE)
    requests[::9] = 0
    lengths = torch.arange(1, bs + 1, dtype=torch.int32, device=DEVICE)
    output = torch.zeros((bs, rows + 1), dtype=torch.int64, device=DEVICE)
    accept_lens, extend = (torch.zeros(bs, dtype=torch.int32, device=DEVICE) for _ in range(2))
    last_rows = torch.full((bs,), -5, dtype=torch.int64, device=DEVICE)
    pool_lens = torch.full((bs,), -5, dtype=torch.int32, device=DEVICE)
    pool_last = torch.full((bs,), -5, dtype=torch.int64, device=DEVICE)
    accept(tokens, drafts, requests, lengths, output, accept_lens, extend, last_rows, pool_lens, pool_last)
    accepted = count_accepted(drafts, tokens) * (requests > 0)
    assert torch.equal(accept_lens, accepted) and torch.equal(output[:, -1], accepted.long())
    assert torch.equal(output[:, :-1], tokens)
    assert torch.equal(extend, lengths + accepted)
    starts = torch.arange(0, bs * rows, rows, device=DEVICE)
    assert torch.equal(last_rows, starts + (accepted - 1).clamp(min=0))
    for i, request in enumerate(requests.tolist()):
        if request:
            assert pool_lens[request] == extend[i]
            assert pool_last[request] == tokens[i, accepted[i] - 1]
    assert pool_lens[0] == pool_last[0] == -5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_dtype", DTYPES)
def test_nextn_inputs(dtype: torch.dtype, hidden_dtype: torch.dtype) -> None:
    from sglang.srt.layers.triton_kernels.nextn_inputs import nextn_inputs

    embed, hidden = randn(11, 48, dtype=dtype), randn(4, 48, dtype=hidden_dtype)
    first, second = randn(48, dtype=dtype), randn(48, dtype=dtype, seed=1)
    tokens = torch.tensor([3, 10, 0, 3], device=DEVICE)
    out = nextn_inputs(tokens, embed, hidden, (first, 1e-6), (second, 1e-5))
    parts = (rms_norm(embed[tokens], first, 1e-6), rms_norm(hidden.to(dtype), second, 1e-5))
    torch.testing.assert_close(out, torch.cat(parts, dim=1), **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 7), (5, 512), (3, 20000), (0, 4)])
def test_argmax(rows: int, size: int, dtype: torch.dtype) -> None:
    """Ties abound; the first of equals is the one."""
    from sglang.srt.layers.triton_kernels.argmax import argmax

    logits = randn(rows, size).mul(2).round().to(dtype)
    first = (
        (logits == logits.amax(dim=1, keepdim=True)).int().cumsum(1).cumsum(1) == 1 if rows else logits > 9
    )
    assert torch.equal(argmax(logits), first.int().argmax(dim=1))
    if rows:
        logits[0] = float("-inf")
        assert argmax(logits)[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [48, 1500])
def test_draft_state(hidden: int, dtype: torch.dtype) -> None:
    from sglang.srt.layers.triton_kernels.draft_state import keep_draft_state, load_draft_state

    requests = torch.tensor([3, 1, 5], dtype=torch.int32, device=DEVICE)
    last, draft = (torch.arange(n, n + 6, device=DEVICE) for n in (100, 200))
    states = randn(6, hidden)
    loaded = load_draft_state(requests, last, draft, states)
    for found, column in zip(loaded, (last, draft, states)):
        assert torch.equal(found, column[requests.long()])
    tokens, new = torch.tensor([7, 8, 9], device=DEVICE), randn(3, hidden + 8, dtype=dtype)[:, :hidden]
    expected_draft, expected = draft.clone(), states.clone()
    expected_draft[requests.long()], expected[requests.long()] = tokens, new.float()
    keep_draft_state(requests, tokens, new, draft, states)
    assert torch.equal(draft, expected_draft) and torch.equal(states, expected)
