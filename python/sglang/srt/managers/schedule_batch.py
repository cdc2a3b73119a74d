"""A request as the scheduler keeps it, and what goes to and comes from the worker in one step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sglang.srt.managers.io_struct import ReqOutput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.sampling.token_logprob import TokenLogprob

if TYPE_CHECKING:
    from sglang.srt.managers.stop_checker import StopStrings
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.radix_cache import TreeNode


def wrap_int64(value: int) -> int:
    """The 64-bit two's complement integer with the same low bits: what a seed's tensor holds."""
    return (value + 2**63) % 2**64 - 2**63


@dataclass(eq=False)
class Req:
    """One sequence. Its key-value pages follow `pages`: position p lies in pages[p // page_size]."""

    rid: str
    input_ids: list[int]
    sampling_params: SamplingParams
    seed: int
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    return_token_sources: bool = False
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprob] = field(default_factory=list)
    output_token_sources: list[int] = field(default_factory=list)  # 0: the target's own; i: accepted draft i
    input_logprobs: list[TokenLogprob] = field(default_factory=list)
    stop_strings: StopStrings | None = None  # with `stop`, from the first output token on
    finish_reason: dict[str, Any] | None = None
    req_pool_idx: int | None = None  # None: holds no device memory
    pages: list[int] = field(default_factory=list)
    cache_node: TreeNode | None = None  # its path is locked: the pages that the prefix cache owns
    kv_len: int = 0  # the committed length: tokens whose target KV is in the cache
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    spec_verify_ct: int = 0
    num_sent: int = 0  # output tokens that a ReqOutput has carried
    queue_time: float = 0.0  # seconds from its arrival until it was first admitted
    arrival: float = field(default_factory=time.perf_counter)

    @classmethod
    def from_input(cls, message: TokenizedGenerateReqInput, seed: int) -> Req:
        return cls(
            rid=message.rid,
            input_ids=message.input_ids,
            sampling_params=message.sampling_params,
            seed=seed,
            stream=message.stream,
            return_logprob=message.return_logprob,
            logprob_start_len=message.logprob_start_len,
            top_logprobs_num=message.top_logprobs_num,
            return_token_sources=message.return_token_sources,
        )

    @property
    def seqlen(self) -> int:
        """Prompt and output tokens; the last one is not in the cache while the request decodes."""
        return len(self.input_ids) + len(self.output_ids)

    @property
    def token_ids(self) -> list[int]:
        return self.input_ids + self.output_ids

    def next_output(self) -> ReqOutput:
        """What no ReqOutput has carried yet."""
        prompt = self.num_sent == 0 and self.logprob_start_len >= 0
        start, self.num_sent = self.num_sent, len(self.output_ids)
        return ReqOutput(
            rid=self.rid,
            output_ids=self.output_ids[start:],
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.input_ids),
            completion_tokens=len(self.output_ids),
            cached_tokens=self.cached_tokens,
            spec_verify_ct=self.spec_verify_ct,
            queue_time=self.queue_time,
            output_logprobs=self.output_logprobs[start:] if self.return_logprob else None,
            input_logprobs=self.input_logprobs[self.logprob_start_len :] if prompt else None,
            output_token_sources=self.output_token_sources[start:] if self.return_token_sources else None,
        )


@dataclass(frozen=True)
class PrefillChunk:
    """The next tokens of a request's prompt: positions req.kv_len .. req.kv_len + len(tokens) - 1."""

    req: Req
    tokens: list[int]
    next_token: int | None  # the token after the chunk; None: the chunk ends the prompt, so sample it


@dataclass(frozen=True)
class StepOutput:
    """New tokens of each request of the step, in the order given to the worker.

    `tokens[i]` is empty for a chunk that does not end its prompt, one token for a prefill or a plain
    decode, and the accepted drafts plus the bonus token (1 .. D) for a speculative decode. The worker has
    advanced the device's seq_lens by the tokens whose KV is now valid: len(chunk) in a prefill,
    len(tokens[i]) in a decode. The scheduler does the same to `Req.kv_len`.
    """

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprob]] | None = None  # as tokens, where any request asked for them
    input_logprobs: list[list[TokenLogprob]] | None = None  # of each chunk's own tokens (prefill only)


class PendingOutput(Protocol):
    """A decode step that is launched."""

    def read(self) -> StepOutput:
        """Waits for its tokens; to be called once."""
        ...


@dataclass(frozen=True)
class DecodeStep:
    """A decode step in flight, and whose it is."""

    reqs: list[Req]
    pending: PendingOutput


class GenerationWorker(Protocol):
    """Runs the model: plain (`TpModelWorker`) or speculative (`EAGLEWorker`)."""

    req_to_token_pool: ReqToTokenPool
    lookahead: int  # slots past the committed length that a decode step writes: 1, or D when speculating
    page_size: int
    num_pages: int  # pages 1 .. num_pages; page 0 is reserved
    context_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    overlaps: bool  # a second decode step may be launched before the first is read

    def prefill(self, chunks: list[PrefillChunk]) -> StepOutput:
        """One eager pass over all chunks."""
        ...

    def launch_decode(self, reqs: list[Req]) -> PendingOutput:
        """Starts one step of every request: a token each, or draft, verify and draft-extend."""
        ...

    def internal_state(self) -> dict[str, Any]:
        """For /get_server_info: accept length, the state of the metadata path."""
        ...
