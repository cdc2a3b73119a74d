"""When a request has generated enough."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sglang.srt.managers.schedule_batch import Req


class StopChecker:
    """Says after each token whether it ends its request, and why, in SGLang's words."""

    def __init__(
        self, eos_token_ids: Set[int], context_len: int, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.eos_token_ids = eos_token_ids
        self.context_len = context_len
        self.tokenizer = tokenizer

    def check(self, req: Req) -> dict[str, Any] | None:
        """The finish reason where the last token of `req.output_ids` ends it. Call it after every token."""
        params, token = req.sampling_params, req.output_ids[-1]
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return {"type": "stop", "matched": token}
        if params.stop and (matched := self._matched_stop(req)) is not None:
            return {"type": "stop", "matched": matched}
        if len(req.output_ids) >= params.max_new_tokens or req.seqlen >= self.context_len:
            return {"type": "length", "length": len(req.output_ids)}
        return None

    def _matched_stop(self, req: Req) -> str | None:
        """The stop string that the last token completed.

        Earlier tokens were checked in their turn, so a match ends in the last token, and every token but
        a special one adds at least a byte: a tail of as many tokens as the string has bytes holds it. One
        more token keeps tokenizers that strip a leading space from stripping one of the match.
        """
        assert self.tokenizer is not None, "a request with stop strings was admitted without a tokenizer"
        longest = max(len(stop.encode()) for stop in req.sampling_params.stop)
        tail = self.tokenizer.decode(req.output_ids[-(longest + 1) :], skip_special_tokens=False)
        return next((stop for stop in req.sampling_params.stop if stop in tail), None)
