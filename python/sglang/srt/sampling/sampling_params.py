"""How one request's tokens are sampled: the parameters, checked once where they enter."""

from __future__ import annotations

import msgspec

MAX_LOGIT_BIAS = 1024  # tokens
MAX_FLOAT32 = 3.4028234663852886e38  # what a tensor of sampling parameters holds


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
    frequency_penalty: float = 0.0  # subtracted once for each time that the token was generated
    presence_penalty: float = 0.0  # subtracted from every token that was generated
    repetition_penalty: float = 1.0  # divides a generated token's logit above 0, multiplies one below
    logit_bias: dict[str, float] | None = None  # added to the logit of the token id
    min_new_tokens: int = 0  # before it no end-of-sequence and no stop token is sampled
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False

    @property
    def counts_outputs(self) -> bool:
        """Whether it matters which tokens were generated."""
        return (self.frequency_penalty, self.presence_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def filters(self) -> bool:
        """Whether some tokens cannot be sampled, where any is sampled."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        return self.counts_outputs or bool(self.logit_bias) or self.min_new_tokens > 0

    def validate(self, vocab_size: int) -> None:
        """Raises ValueError naming the first parameter that is out of range, and its value."""
        checks: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", self.max_new_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature <= MAX_FLOAT32, f"in [0, {MAX_FLOAT32:.7g}]"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k == -1 or self.top_k >= 1, "-1 (off) or at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            # The lower limit keeps logits finite.
            ("repetition_penalty", 1e-5 <= self.repetition_penalty <= 2, "in [0.00001, 2]"),
            (
                "min_new_tokens",
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"in [0, {self.max_new_tokens}], the largest number of new tokens",
            ),
            ("stop", all(self.stop), "without empty strings"),
            (
                "stop_token_ids",
                0 <= min(self.stop_token_ids, default=0) <= max(self.stop_token_ids, default=0) < vocab_size,
                f"in [0, {vocab_size})",
            ),
        )
        for name, ok, expected in checks:
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        self._validate_logit_bias(vocab_size)

    def _validate_logit_bias(self, vocab_size: int) -> None:
        bias = self.logit_bias or {}
        if len(bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias must hold at most {MAX_LOGIT_BIAS} tokens, got {len(bias)}")
        for token, value in bias.items():
            # Only the usual spelling, so that no token is named twice.
            if not (token.isascii() and token.isdecimal() and token == str(int(token[:10]))):
                raise ValueError(f"logit_bias must name token ids, got {token[:40]!r}")
            if int(token) >= vocab_size:
                raise ValueError(f"logit_bias must name tokens in [0, {vocab_size}), got {token}")
            if not -100 <= value <= 100:
                raise ValueError(
                    f"logit_bias must hold values in [-100, 100], got {value!r} for token {token}"
                )
