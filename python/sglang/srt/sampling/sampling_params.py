"""How one request's tokens are sampled: the parameters, checked once where they enter."""

from __future__ import annotations

import math

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters with SGLang's names.

    The randomness of the token at position p is a function of (seed, p) alone, so the same request with
    the same seed gives the same tokens however it is batched and whether or not it is speculated.
    """

    max_new_tokens: int = 128  # 0: the prompt alone, for its logprobs or to fill the cache
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: all of the vocabulary
    min_p: float = 0.0
    seed: int | None = None  # None: drawn by the server
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False

    def validate(self, vocab_size: int) -> None:
        """Raises ValueError naming the first parameter that is out of range, and its value."""
        checks: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", self.max_new_tokens >= 0, "at least 0"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "finite and >= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k == -1 or self.top_k >= 1, "-1 (off) or at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "in [0, 2**63)"),
            ("stop", all(self.stop), "without empty strings"),
            (
                "stop_token_ids",
                all(0 <= t < vocab_size for t in self.stop_token_ids),
                f"in [0, {vocab_size})",
            ),
        )
        for name, ok, expected in checks:
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
