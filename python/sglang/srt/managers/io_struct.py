"""What the tokenizer process and the scheduler process say to each other (msgpack over ZeroMQ)."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.sampling.token_logprob import TokenLogprob


def new_rid() -> str:
    return uuid.uuid4().hex


class TokenizedGenerateReqInput(msgspec.Struct, tag=True, kw_only=True):
    """One sequence to generate. `n` > 1 and batches are split into several of these before they are sent."""

    rid: str  # made by the server (`new_rid`), never used twice; a client's own rid stays at the edge
    input_ids: list[int]
    sampling_params: SamplingParams
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1  # -1: no prompt logprobs; i: of the prompt tokens from position i on
    top_logprobs_num: int = 0  # at most MAX_TOP_LOGPROBS
    return_token_sources: bool = False


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
    input_logprobs: list[TokenLogprob] | None = None  # with the first output, when asked for
    output_token_sources: list[int] | None = None  # one for each of output_ids: 0 target, i accepted draft i


class BatchOutput(msgspec.Struct, tag=True):
    outputs: list[ReqOutput]


class SchedulerReady(msgspec.Struct, tag=True):
    """Sent once, when the scheduler can take requests."""

    max_total_num_tokens: int
    max_req_input_len: int  # a longer prompt is refused
    context_length: int


class SchedulerFailed(msgspec.Struct, tag=True):
    """The scheduler process is about to end; `message` says why."""

    message: str


ToScheduler = TokenizedGenerateReqInput | AbortReq | FlushCacheReqInput | GetInternalStateReq
FromScheduler = (
    BatchOutput | FlushCacheReqOutput | GetInternalStateReqOutput | SchedulerReady | SchedulerFailed
)
