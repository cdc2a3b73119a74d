"""When a request has generated enough."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams


class StopChecker:
    """Says after each token whether it ends its request, and why, in SGLang's words."""

    def __init__(
        self, eos_token_ids: Set[int], context_len: int, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.eos_token_ids = eos_token_ids
        self.context_len = context_len
        self.tokenizer = tokenizer
        self.special_tokens: dict[int, str] = {}
        if tokenizer is not None:
            self.special_tokens = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))

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
        """The stop string that the last token completed, in the text as its client gets it.

        A special token's own text counts too where special tokens are hidden: clients name them as stops.
        Earlier tokens were checked in their turn, so a match ends in the last token, and every token that
        is shown adds at least a byte: a tail of as many as the string has bytes holds it. One more token
        keeps tokenizers that strip a leading space from stripping one of the match.
        """
        assert self.tokenizer is not None, "a request with stop strings was admitted without a tokenizer"
        params = req.sampling_params
        tail = self._tail(req.output_ids, max(len(stop.encode()) for stop in params.stop) + 1, params)
        text = self.tokenizer.decode(
            tail, skip_special_tokens=params.skip_special_tokens, clean_up_tokenization_spaces=False
        )
        found = find_stop(text, params.stop)
        own = self.special_tokens.get(req.output_ids[-1])
        return found[1] if found else own if own in params.stop else None

    def _tail(self, ids: list[int], count: int, params: SamplingParams) -> list[int]:
        """The last tokens, `count` of them shown."""
        tail = ids[-count:]
        if not (params.skip_special_tokens and self.special_tokens.keys() & tail):
            return tail
        start = len(ids)
        while start > 0 and count > 0:
            start -= 1
            count -= ids[start] not in self.special_tokens
        return ids[start:]


def find_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop string begins, and which it is."""
    return min(((text.find(stop), stop) for stop in stops if stop in text), default=None)
