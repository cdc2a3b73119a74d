"""What a server can take: which requests are possible, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.token_logprob import MAX_TOP_LOGPROBS


@dataclass(frozen=True)
class RequestLimits:
    """Raises ValueError where no request at all would be possible."""

    vocab_size: int
    context_len: int
    max_total_num_tokens: int  # what the cache holds
    lookahead: int  # slots that a decode step writes beyond the committed ones
    has_tokenizer: bool

    def __post_init__(self) -> None:
        if self.max_req_input_len < 1:
            raise ValueError(
                f"--max-total-tokens {self.max_total_num_tokens} holds no request: a step writes "
                f"{self.lookahead} tokens beside the prompt"
            )

    @property
    def max_req_input_len(self) -> int:
        return min(self.context_len - 1, self.max_total_num_tokens - self.lookahead)

    def check(self, message: TokenizedGenerateReqInput) -> None:
        """Raises ValueError naming what makes the request impossible."""
        params, length, vocab_size = message.sampling_params, len(message.input_ids), self.vocab_size
        if length == 0:
            raise ValueError("the prompt is empty")
        if outside := [t for t in message.input_ids if not 0 <= t < vocab_size]:
            raise ValueError(f"input_ids must be in [0, {vocab_size}), got {outside[0]}")
        params.validate(vocab_size)
        if params.stop and not self.has_tokenizer:
            raise ValueError(f"stop {list(params.stop)} needs a tokenizer")
        if not 0 <= message.top_logprobs_num <= MAX_TOP_LOGPROBS:
            raise ValueError(
                f"top_logprobs_num must be in [0, {MAX_TOP_LOGPROBS}], got {message.top_logprobs_num}"
            )
        if not -1 <= message.logprob_start_len < length:
            raise ValueError(f"logprob_start_len must be in [-1, {length}), got {message.logprob_start_len}")
        if length > self.max_req_input_len:
            raise ValueError(f"the prompt has {length} tokens; the maximum is {self.max_req_input_len}")
        longest = min(length + params.max_new_tokens, self.context_len)
        if longest - 1 + self.lookahead > self.max_total_num_tokens:
            raise ValueError(
                f"the prompt's {length} tokens and max_new_tokens {params.max_new_tokens} "
                f"do not fit into the cache of {self.max_total_num_tokens} tokens"
            )
