"""The log-probability of one token, as requests ask for it."""

from __future__ import annotations

import msgspec

MAX_TOP_LOGPROBS = 20


class TokenLogprob(msgspec.Struct, array_like=True):
    token_id: int
    logprob: float | None  # None: the first prompt token, which nothing predicts
    top: list[tuple[int, float]]  # (token id, logprob), most likely first
