"""The sampler against a plain reference, and its noise against the distribution that it claims."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.gumbel_noise import gumbel_noise, hash_bits
from sglang.srt.layers.sampler import keep_mask, noise_function, sample


@dataclass(frozen=True)
class Rows:
    """The parameters of R rows."""

    temperature: list[float]
    top_p: list[float]
    top_k: list[int]
    min_p: list[float]
    seed: list[int]
    position: list[int]

    def sample(self, logits: torch.Tensor, **promises: bool) -> torch.Tensor:
        return sample(
            logits,
            torch.tensor(self.position, dtype=torch.int64),
            torch.tensor(self.temperature),
            torch.tensor(self.top_p),
            torch.tensor(self.top_k, dtype=torch.int64),
            torch.tensor(self.min_p),
            torch.tensor(self.seed, dtype=torch.int64),
            **promises,
        )

    def pick(self, rows: list[int]) -> Rows:
        return Rows(*([column[i] for i in rows] for column in vars(self).values()))

    @classmethod
    def same(cls, count: int, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=7, position=0) -> Rows:
        columns = ([v] * count for v in (temperature, top_p, top_k, min_p, seed))
        return cls(*columns, position=list(range(position, position + count)))


def random_rows(count: int, seed: int) -> Rows:
    g = torch.Generator().manual_seed(seed)

    def draw(values: list) -> list:
        return [values[i] for i in torch.randint(len(values), (count,), generator=g).tolist()]

    return Rows(
        temperature=draw([0.0, 0.1, 0.7, 1.0, 2.5]),
        top_p=draw([0.1, 0.5, 0.9, 1.0]),
        top_k=draw([0, 1, 3, 20, 10_000]),
        min_p=draw([0.0, 0.05, 0.5, 1.0]),
        seed=draw([0, 1, 2**31, 2**32 + 5, 2**63 - 1]),
        position=draw([0, 1, 5, 131_071, 163_839]),
    )


def plain_keep(probs: list[float], top_p: float, top_k: int, min_p: float) -> set[int]:
    """The rules of keep_mask, one token after another."""
    kept: set[int] = set()
    before = 0.0
    ranked = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    for rank, token in enumerate(ranked):
        if (
            (top_k <= 0 or rank < top_k)
            and (top_p >= 1 or before <= top_p)
            and probs[token] >= min_p * probs[ranked[0]]
        ):
            kept.add(token)
        before += probs[token]
    return kept


@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.integers(-6, 6), min_size=1, max_size=40),  # integers: many ties
    top_p=st.sampled_from([0.013, 0.31, 0.77, 0.951, 1.0]),
    top_k=st.integers(0, 45),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 0.9]),
)
def test_filters_equal_the_plain_reference(logits: list[int], top_p: float, top_k: int, min_p: float) -> None:
    scores = torch.tensor([logits], dtype=torch.float32)
    mask = keep_mask(scores, torch.tensor([top_p]), torch.tensor([top_k]), torch.tensor([min_p]))
    probs = scores.double().softmax(-1)[0].tolist()
    assert set(mask[0].nonzero().flatten().tolist()) == plain_keep(probs, top_p, top_k, min_p)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_a_row_does_not_depend_on_its_batch(seed: int) -> None:
    rows = random_rows(12, seed)
    logits = torch.randn(12, 61, generator=torch.Generator().manual_seed(seed)) * 3
    together = rows.sample(logits)
    for i in range(12):
        assert rows.pick([i]).sample(logits[i : i + 1]).item() == together[i]
    order = list(range(11, -1, -1))
    assert torch.equal(rows.pick(order).sample(logits[order]), together[order])


def test_a_promise_of_the_host_changes_nothing() -> None:
    logits = torch.randn(64, 301) * 3
    unfiltered = Rows.same(64, temperature=0.8)
    assert torch.equal(unfiltered.sample(logits), unfiltered.sample(logits, needs_filter=False))
    greedy = Rows.same(64, temperature=0.0, top_p=0.2, top_k=2)
    assert torch.equal(greedy.sample(logits), logits.argmax(-1))


def test_sampled_tokens_pass_the_filters() -> None:
    rows = random_rows(400, 3)
    logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(4)) * 2
    tokens = rows.sample(logits).tolist()
    for i, token in enumerate(tokens):
        if rows.temperature[i] == 0:
            assert token == logits[i].argmax()
            continue
        probs = (logits[i].double() / rows.temperature[i]).softmax(-1).tolist()
        assert token in plain_keep(probs, rows.top_p[i], rows.top_k[i], rows.min_p[i])


def test_frequencies_are_the_probabilities() -> None:
    count = 40_000
    logits = torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -3.0])
    tokens = Rows.same(count, temperature=0.7).sample(logits.expand(count, -1))
    expected = (logits / 0.7).softmax(-1) * count
    chi_square = ((torch.bincount(tokens, minlength=6) - expected) ** 2 / expected).sum()
    assert chi_square < 25.7  # 5 degrees of freedom, p = 1e-4


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(torch.tensor([11, 12]), torch.tensor([0, 1]), 100_000).flatten()
    assert noise.isfinite().all()
    ordered = noise.double().sort().values
    theory = torch.exp(-torch.exp(-ordered))  # the distribution function
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert (theory - steps).abs().max() < 2.2 / math.sqrt(len(ordered))  # Kolmogorov-Smirnov, p = 1e-4


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((7, 0), (7, 1)),
        ((7, 1), (8, 0)),
        ((7, 0), (7 + 2**32, 0)),
        ((0, 5), (5, 0)),
        ((1, 0), (2**63 - 1, 0)),
    ],
    ids=["position", "both", "high_bits_of_the_seed", "swapped", "large_seed"],
)
def test_noise_of_different_keys_is_independent(a: tuple[int, int], b: tuple[int, int]) -> None:
    n = 50_000
    noise = gumbel_noise(torch.tensor([a[0], b[0]]), torch.tensor([a[1], b[1]]), n)
    assert abs(torch.corrcoef(noise)[0, 1]) < 4 / math.sqrt(n)
    shifted = torch.stack((noise[0, 1:], noise[1, :-1]))
    assert abs(torch.corrcoef(shifted)[0, 1]) < 4 / math.sqrt(n)


def test_every_bit_of_the_hash_is_fair_and_fits_32_bits() -> None:
    bits = hash_bits(torch.tensor([2**63 - 1]), torch.tensor([163_839]), 100_000)[0]
    assert bits.min() >= 0 and bits.max() < 2**32
    ones = torch.stack([((bits >> i) & 1).float().mean() for i in range(32)])
    assert (ones - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(100_000)


def test_hash_bits_are_pinned() -> None:
    """A change here changes the output of every seeded request."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    for seed, position in ((0, 0), (2**63 - 1, 77), (1234567890123, 163_839)):
        key = mix(mix(mix(seed % 2**32) ^ (seed >> 32)) ^ position)
        expected = [mix(mix(token ^ key) ^ mix(key ^ 0x9E3779B9)) for token in range(50)]
        assert hash_bits(torch.tensor([seed]), torch.tensor([position]), 50)[0].tolist() == expected


def test_tiny_temperature_is_nearly_greedy_and_never_nan() -> None:
    logits = torch.randn(32, 40) * 100
    assert torch.equal(Rows.same(32, temperature=1e-30).sample(logits), logits.argmax(-1))


def test_no_rows() -> None:
    assert Rows.same(0).sample(torch.zeros(0, 9)).shape == (0,)


@pytest.mark.gpu
def test_cuda_hash_is_the_same() -> None:
    seed, position = torch.tensor([0, 2**63 - 1]), torch.tensor([3, 163_839])
    assert torch.equal(hash_bits(seed.cuda(), position.cuda(), 5000).cpu(), hash_bits(seed, position, 5000))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (1, 1), (3, 512), (2, 2049), (5, 129_280)])
def test_triton_noise_equals_torch(rows: int, vocab: int) -> None:
    """Equal bits: a wrong one would be off by far more than the logarithms' last digit."""
    g = torch.Generator().manual_seed(rows)
    seed = torch.randint(-(2**62), 2**62, (rows,), generator=g)
    positions = torch.randint(0, 200_000, (2 * rows,), generator=g)[::2]
    found = noise_function("cuda")(seed.cuda(), positions.cuda(), vocab)
    torch.testing.assert_close(found.cpu(), gumbel_noise(seed, positions, vocab), rtol=1e-5, atol=1e-6)
