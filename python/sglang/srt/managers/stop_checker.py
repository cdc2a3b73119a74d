"""When a request has generated enough."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.detokenizer import IncrementalDetokenizer, Tokenizer, find_stop
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.tokenizer import special_tokens

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class StopStrings:
    """Looks for the stop strings of one request in its text, as its client gets it.

    A token costs the same however long the stops and the text are: it is decoded behind the few before it,
    and searched behind as much of the text as a stop may begin in.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._stops = params.stop
        self._hidden = special_tokens(tokenizer) if params.skip_special_tokens else {}
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
        self._tail = ""  # of the text that was searched
        self._longest = max(map(len, params.stop))

    def feed(self, token: int) -> str | None:
        """The stop string that this token completes.

        A special token's own text counts too where special tokens are hidden: clients name them as stops.
        """
        if (own := self._hidden.get(token)) is not None:
            return own if own in self._stops else None
        self._tail += self._detokenizer.feed([token])
        found = find_stop(self._tail + self._detokenizer.held, self._stops)
        self._tail = self._tail[-self._longest :]
        return found[1] if found else None


class StopChecker:
    """Says after each token whether it ends its request, and why, in SGLang's words."""

    def __init__(self, eos_token_ids: Set[int], context_len: int, tokenizer: Tokenizer | None) -> None:
        self.eos_token_ids = eos_token_ids
        self.context_len = context_len
        self.tokenizer = tokenizer

    def check(self, req: Req) -> dict[str, Any] | None:
        """The finish reason where the last token of `req.output_ids` ends it. Call it after every token."""
        params, token = req.sampling_params, req.output_ids[-1]
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return {"type": "stop", "matched": token}
        if params.stop and (matched := self._stop_strings(req).feed(token)) is not None:
            return {"type": "stop", "matched": matched}
        if len(req.output_ids) >= params.max_new_tokens or req.seqlen >= self.context_len:
            return {"type": "length", "length": len(req.output_ids)}
        return None

    def _stop_strings(self, req: Req) -> StopStrings:
        if req.stop_strings is None:
            assert self.tokenizer is not None, "a request with stop strings was admitted without a tokenizer"
            req.stop_strings = StopStrings(self.tokenizer, req.sampling_params)
        return req.stop_strings
