"""What the tokenizer process and the scheduler process say to each other (msgpack over ZeroMQ)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.sampling.token_logprob import TokenLogprob

PIECE_ROWS = 64  # tokens of one sequence, with what belongs to them, in one message
MESSAGE_WEIGHT = 4096  # values in one message


def new_rid() -> str:
    return uuid.uuid4().hex


class TokenizedGenerateReqInput(msgspec.Struct, kw_only=True):
    """One sequence to generate. `n` > 1 and batches are several of these."""

    rid: str  # made by the server (`new_rid`), never used twice; a client's own rid stays at the edge
    input_ids: list[int]
    sampling_params: SamplingParams
    choice: int = 0  # which of n: with a seed, each choice has a seed of its own
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1  # -1: no prompt logprobs; i: of the prompt tokens from position i on
    top_logprobs_num: int = 0  # at most MAX_TOP_LOGPROBS
    return_token_sources: bool = False


class PackedSequence(msgspec.Struct, array_like=True):
    """A TokenizedGenerateReqInput whose tokens and sampling parameters are given by their indices."""

    input_ids: int
    sampling_params: int
    others: dict[str, Any]


class BatchTokenizedGenerateReqInput(msgspec.Struct, tag=True):
    """The sequences of one request: what they share is sent once."""

    input_ids: list[list[int]]
    sampling_params: list[SamplingParams]
    sequences: list[PackedSequence]

    @classmethod
    def pack(cls, requests: Sequence[TokenizedGenerateReqInput]) -> BatchTokenizedGenerateReqInput:
        """Sequences share what is the same object."""
        prompts = {id(r.input_ids): r.input_ids for r in requests}
        params = {id(r.sampling_params): r.sampling_params for r in requests}
        prompt_index = {key: i for i, key in enumerate(prompts)}
        params_index = {key: i for i, key in enumerate(params)}
        sequences = [
            PackedSequence(
                prompt_index[id(r.input_ids)],
                params_index[id(r.sampling_params)],
                {name: getattr(r, name) for name in UNSHARED},
            )
            for r in requests
        ]
        return cls(list(prompts.values()), list(params.values()), sequences)

    def unpack(self) -> Iterator[TokenizedGenerateReqInput]:
        for s in self.sequences:
            yield TokenizedGenerateReqInput(
                input_ids=self.input_ids[s.input_ids],
                sampling_params=self.sampling_params[s.sampling_params],
                **s.others,
            )


UNSHARED = tuple(
    name
    for name in TokenizedGenerateReqInput.__struct_fields__
    if name not in ("input_ids", "sampling_params")
)


class AbortReq(msgspec.Struct, tag=True):
    """Ends these sequences as they stand. Each that is there answers with its last ReqOutput."""

    rids: list[str]


class FlushCacheReqInput(msgspec.Struct, tag=True):
    request_id: str


class FlushCacheReqOutput(msgspec.Struct, tag=True):
    request_id: str
    success: bool
    message: str = ""


class GetInternalStateReq(msgspec.Struct, tag=True):
    request_id: str


class GetInternalStateReqOutput(msgspec.Struct, tag=True):
    request_id: str
    internal_state: dict[str, Any]


class ReqOutput(msgspec.Struct, kw_only=True):
    """What is new of one request since the last ReqOutput with its rid."""

    rid: str
    output_ids: list[int]  # new tokens only; a matched stop token is included, tokens after it never
    finish_reason: dict[str, Any] | None  # {"type": "stop"|"length"|"abort", "matched": ..., "message": ...}
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_time: float = 0.0  # seconds that it waited before it first ran
    spec_verify_ct: int  # verify passes so far; completion_tokens / spec_verify_ct is the accept length
    output_logprobs: list[TokenLogprob] | None = None  # one for each of output_ids
    input_logprobs: list[TokenLogprob] | None = None  # before or with the first of output_ids
    output_token_sources: list[int] | None = None  # one for each of output_ids: 0 target, i accepted draft i

    @property
    def weight(self) -> int:
        """About how long it takes to decode, in values."""
        entries = (self.output_logprobs or []) + (self.input_logprobs or [])
        return len(self.output_ids) + sum(1 + len(entry.top) for entry in entries)

    def pieces(self) -> Iterator[ReqOutput]:
        """The same, with at most PIECE_ROWS tokens or logprobs each. The finish reason is in the last."""
        prompt, count = self.input_logprobs, len(self.output_ids)
        if count <= PIECE_ROWS and not (prompt and len(prompt) > PIECE_ROWS):
            yield self
            return
        empty = msgspec.structs.replace(
            self,
            output_ids=[],
            output_logprobs=None,
            output_token_sources=None,
            completion_tokens=self.completion_tokens - count,
            finish_reason=None,
        )
        for start in range(0, len(prompt or []), PIECE_ROWS):
            yield msgspec.structs.replace(empty, input_logprobs=prompt[start : start + PIECE_ROWS])
        for start in range(0, max(count, 1), PIECE_ROWS):
            end = min(start + PIECE_ROWS, count)
            yield msgspec.structs.replace(
                self,
                output_ids=self.output_ids[start:end],
                output_logprobs=self.output_logprobs and self.output_logprobs[start:end],
                output_token_sources=self.output_token_sources and self.output_token_sources[start:end],
                input_logprobs=None,
                completion_tokens=self.completion_tokens - count + end,
                finish_reason=self.finish_reason if end == count else None,
            )


class BatchOutput(msgspec.Struct, tag=True):
    outputs: list[ReqOutput]

    def pieces(self) -> Iterator[BatchOutput]:
        """The same in messages that are short to decode."""
        outputs: list[ReqOutput] = []
        weight = 0
        for piece in (piece for output in self.outputs for piece in output.pieces()):
            if weight > MESSAGE_WEIGHT:
                yield BatchOutput(outputs)
                outputs, weight = [], 0
            outputs.append(piece)
            weight += piece.weight
        yield BatchOutput(outputs)


class SchedulerReady(msgspec.Struct, tag=True):
    """Sent once, when the scheduler can take requests."""

    max_total_num_tokens: int
    max_req_input_len: int  # a longer prompt is refused
    context_length: int
    vocab_size: int  # the model's; the tokenizer's may be smaller


class Heartbeat(msgspec.Struct, tag=True):
    """The scheduler process lives, whatever its step is doing."""


class SchedulerFailed(msgspec.Struct, tag=True):
    """The scheduler process is about to end; `message` says why."""

    message: str


ToScheduler = BatchTokenizedGenerateReqInput | AbortReq | FlushCacheReqInput | GetInternalStateReq
FromScheduler = (
    BatchOutput
    | FlushCacheReqOutput
    | GetInternalStateReqOutput
    | SchedulerReady
    | SchedulerFailed
    | Heartbeat
)
