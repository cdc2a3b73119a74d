"""One sequence of an answer, as far as it has come, and SGLang's native form of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.io_struct import ReqOutput, TokenizedGenerateReqInput
from sglang.srt.sampling.token_logprob import TokenLogprob

TokenText = Callable[[list[int]], str]
Triple = tuple[float | None, int, str | None]  # logprob, token, its text if asked for


@dataclass
class Choice:
    request: TokenizedGenerateReqInput
    rid: str  # what its client calls it
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprob] = field(default_factory=list)
    input_logprobs: list[TokenLogprob] = field(default_factory=list)
    output_token_sources: list[int] = field(default_factory=list)
    output_text_offsets: list[int] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    spec_verify_ct: int = 0
    created: float = field(default_factory=time.perf_counter)
    latency: float = 0.0  # seconds from its creation to its last output

    def add(self, output: ReqOutput, text: str, text_offsets: Sequence[int] = ()) -> None:
        self.text += text
        self.output_text_offsets += text_offsets
        self.output_token_sources += output.output_token_sources or []
        self.output_ids += output.output_ids
        self.output_logprobs += output.output_logprobs or []
        self.input_logprobs += output.input_logprobs or []
        self.finish_reason = output.finish_reason
        self.completion_tokens = output.completion_tokens
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        self.spec_verify_ct = max(self.spec_verify_ct, output.spec_verify_ct)
        self.latency = time.perf_counter() - self.created

    def native(self, token_text: TokenText | None = None) -> dict[str, Any]:
        """What /generate and `Engine.generate` answer; `token_text` puts texts beside logprobs."""
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": self.finish_reason,
            "prompt_tokens": len(self.request.input_ids),
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "e2e_latency": self.latency,
            "spec_verify_ct": self.spec_verify_ct,
        }
        if self.spec_verify_ct:
            meta["spec_accept_length"] = self.completion_tokens / self.spec_verify_ct
        if self.request.return_token_sources:
            meta["output_token_sources"] = list(self.output_token_sources)
            meta["output_text_offsets"] = list(self.output_text_offsets)
        if self.request.return_logprob:
            for side, entries in (("input", self.input_logprobs), ("output", self.output_logprobs)):
                meta[f"{side}_token_logprobs"] = [_triple(e.logprob, e.token_id, token_text) for e in entries]
                if self.request.top_logprobs_num:
                    meta[f"{side}_top_logprobs"] = [_top(e, token_text) for e in entries]
        return {"text": self.text, "output_ids": list(self.output_ids), "meta_info": meta}


def _triple(logprob: float | None, token_id: int, text: TokenText | None) -> Triple:
    return logprob, token_id, text([token_id]) if text else None


def _top(entry: TokenLogprob, text: TokenText | None) -> list[Triple] | None:
    return [_triple(logprob, token_id, text) for token_id, logprob in entry.top] if entry.top else None
