"""Logprobs of a long prompt, computed in pieces."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.logprobs import MAX_ROWS, hidden_logprobs, token_logprobs


@pytest.mark.parametrize(
    "count", [1, 2, MAX_ROWS - 1, MAX_ROWS, MAX_ROWS + 1, 2 * MAX_ROWS, 3 * MAX_ROWS + 7]
)
def test_pieces_have_bounded_rows_and_the_same_bits(count: int) -> None:
    """Bug: the logits of a whole chunk were there at once: 1 GB for 2,048 tokens and a vocabulary of 129k."""
    generator = torch.Generator().manual_seed(count)
    head = torch.randn(512, 128, generator=generator)  # [vocab, hidden], float32
    hidden_states = torch.randn(count, 128, generator=generator)  # [count, hidden], float32
    token_ids = torch.randint(512, (count,), generator=generator)  # [count], int64
    rows: list[int] = []

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return torch.nn.functional.linear(hidden, head)

    in_pieces = hidden_logprobs(hidden_states, compute_logits, token_ids, 5)
    assert in_pieces == token_logprobs(compute_logits(hidden_states), token_ids, 5)
    assert max(rows[:-1]) <= MAX_ROWS  # the last call is the reference's
