"""One sequence of an answer, as far as it has come, and SGLang's native form of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.io_struct import ReqOutput, TokenizedGenerateReqInput
from sglang.srt.sampling.token_logprob import TokenLogprob

TokenText = Callable[[int], str]
Triple = tuple[float | None, int, str | None]  # logprob, token, its text if asked for


def identity(value: Any) -> Any:
    return value


@dataclass
class Choice:
    request: TokenizedGenerateReqInput
    rid: str  # what its client calls it
    names: frozenset[str] = frozenset()  # all that ends it: its rid, and those of what it is part of
    token_text: TokenText | None = None  # puts texts beside the logprobs of `native`
    pack: Callable[[Any], Any] = identity  # turns each entry of those into what `native` shall hold
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
    _packed: dict[str, tuple[list[Any], list[Any]]] = field(default_factory=dict)

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

    def native(self, prompt_logprobs: bool = True) -> dict[str, Any]:
        """What /generate and `Engine.generate` answer."""
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
            meta |= self._native_logprobs("output", self.output_logprobs)
            if prompt_logprobs:
                meta |= self._native_logprobs("input", self.input_logprobs)
        return {"text": self.text, "output_ids": list(self.output_ids), "meta_info": meta}

    def _native_logprobs(self, side: str, entries: list[TokenLogprob]) -> dict[str, Any]:
        """What is known is kept: a stream that tells all of it at every event packs each entry once."""
        tokens, tops = self._packed.setdefault(side, ([], []))
        for entry in entries[len(tokens) :]:
            tokens.append(self.pack(self._triple(entry.logprob, entry.token_id)))
            top = [self._triple(logprob, token_id) for token_id, logprob in entry.top]
            tops.append(self.pack(top or None))
        described = {f"{side}_token_logprobs": list(tokens)}
        return described | ({f"{side}_top_logprobs": list(tops)} if self.request.top_logprobs_num else {})

    def _triple(self, logprob: float | None, token_id: int) -> Triple:
        return logprob, token_id, self.token_text(token_id) if self.token_text else None
