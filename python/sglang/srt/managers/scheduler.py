"""Continuous batching: which requests run in the next step, and what becomes of its tokens."""

from __future__ import annotations

import bisect
import logging
import random
import time
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchOutput,
    BatchTokenizedGenerateReqInput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    ReqOutput,
    SchedulerReady,
    TokenizedGenerateReqInput,
    ToScheduler,
)
from sglang.srt.managers.prefill_budget import PrefillBudget
from sglang.srt.managers.prefill_queue import PrefillQueue
from sglang.srt.managers.request_limits import RequestLimits
from sglang.srt.managers.schedule_batch import (
    DecodeStep,
    GenerationWorker,
    PrefillChunk,
    Req,
    StepOutput,
    wrap_int64,
)
from sglang.srt.managers.scheduler_link import SchedulerLink, aborted
from sglang.srt.managers.stop_checker import StopChecker
from sglang.srt.managers.throughput import Throughput
from sglang.srt.mem_cache.allocator import PageAllocator
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.request_memory import RequestMemory
from sglang.srt.sampling.token_logprob import TokenLogprob
from sglang.srt.server_args import ServerArgs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Scheduler:
    """Owns all requests from their arrival to their last token.

    A request waits in the queue, is prefilled chunk by chunk, runs, and finishes. When pages run out, the
    youngest running requests go back to the head of the queue and are prefilled again with what they have
    generated so far.

    Where the worker overlaps, a decode step is launched before the tokens of the one before it are read: the
    device works while the host looks at them. What such a step says of a request that has meanwhile ended
    is dropped; what it writes lies in memory that whoever gets it next writes later.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        worker: GenerationWorker,
        link: SchedulerLink,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.worker = worker
        self.link = link
        self.speculates = worker.lookahead > 1
        self.memory = RequestMemory(
            worker.req_to_token_pool,
            PageAllocator(worker.num_pages),
            RadixCache(worker.page_size, int(self.speculates), not server_args.disable_radix_cache),
        )
        self.limits = RequestLimits(
            vocab_size=worker.vocab_size,
            context_len=worker.context_len,
            max_total_num_tokens=worker.num_pages * worker.page_size,
            lookahead=worker.lookahead,
            has_tokenizer=tokenizer is not None,
        )
        self.stops = StopChecker(worker.eos_token_ids, worker.context_len, tokenizer)
        self.seeds = random.Random(server_args.random_seed)
        self.requests: dict[str, Req] = {}  # all that are not finished
        self.queue = PrefillQueue(self.memory, worker.lookahead, server_args.chunked_prefill_size, self.fail)
        self.running: list[Req] = []  # oldest first
        self.in_flight: DecodeStep | None = None  # launched, and not yet read
        self.outputs: list[ReqOutput] = []  # of this step
        self.handlers = {
            BatchTokenizedGenerateReqInput: self.add_requests,
            TokenizedGenerateReqInput: self.add_request,
            AbortReq: self.abort_request,
            FlushCacheReqInput: self.flush_cache,
            GetInternalStateReq: self.send_internal_state,
        }
        self.num_retractions = 0
        self.num_retracted_input_tokens = 0
        self.num_retracted_output_tokens = 0
        self.leak: str | None = None
        self.throughput = Throughput()
        self.prefill_budget = PrefillBudget(server_args.prefill_burst_limit)

    def run(self) -> None:
        while True:
            self.step()

    def step(self) -> None:
        """Receive, schedule, forward, process, send. Waits for a message when there is nothing to do."""
        messages = self.link.receive(block=self.is_idle)
        start = time.perf_counter()
        for message in messages:
            self.handle(message)
        decoding = bool(self.running)
        may_prefill = self.prefill_budget.allows_pass or not decoding
        chunks = self.queue.next_chunks(len(self.running)) if may_prefill else []
        tokens = self.prefill(chunks) if chunks else self.decode() if decoding else None
        self.send_outputs()
        if tokens is None:
            return
        now = time.perf_counter()
        self.throughput.add(tokens, now - start, len(self.running), len(self.queue.waiting))
        if not decoding:
            self.prefill_budget.refill(now)
        elif chunks:
            self.prefill_budget.end_pass(now)

    def prefill(self, chunks: list[PrefillChunk]) -> int:
        """Runs a pass, after the decode step in flight. Returns how many tokens were read."""
        tokens = self.finish_decode()
        output = self.worker.prefill(chunks)
        self.process_prefill(chunks, output)
        return tokens + sum(map(len, output.tokens))

    def decode(self) -> int:
        """Launches a decode step and reads the one before it, or itself where nothing may overlap. Returns
        how many tokens were read."""
        if self.in_flight is not None and self.can_run_ahead():
            reqs = [
                req for req in self.running if len(req.output_ids) + 1 < req.sampling_params.max_new_tokens
            ]
            launched = self.launch_decode(reqs)
            tokens = self.finish_decode()
            self.in_flight = launched
            return tokens
        tokens = self.finish_decode()
        self.in_flight = self.launch_decode(self.schedule_decode())
        overlaps = self.worker.overlaps and not any(req.return_logprob for req in self.running)
        return tokens if overlaps else tokens + self.finish_decode()

    def launch_decode(self, reqs: list[Req]) -> DecodeStep | None:
        return DecodeStep(reqs, self.worker.launch_decode(reqs)) if reqs else None

    def finish_decode(self) -> int:
        """Reads and processes the step in flight, if there is one. Returns how many tokens it had."""
        if self.in_flight is None:
            return 0
        step, self.in_flight = self.in_flight, None
        output = step.pending.read()
        self.prefill_budget.read_step(time.perf_counter())
        self.process_decode(step.reqs, output)
        return sum(map(len, output.tokens))

    @property
    def is_idle(self) -> bool:
        return not self.requests

    def handle(self, message: ToScheduler) -> None:
        self.handlers[type(message)](message)

    # Messages

    def ready(self) -> SchedulerReady:
        return SchedulerReady(
            self.limits.max_total_num_tokens,
            self.limits.max_req_input_len,
            self.worker.context_len,
            self.worker.vocab_size,
        )

    def add_requests(self, message: BatchTokenizedGenerateReqInput) -> None:
        for request in message.unpack():
            self.add_request(request)

    def add_request(self, message: TokenizedGenerateReqInput) -> None:
        try:
            self.validate(message)
        except ValueError as error:
            self.outputs.append(aborted(message.rid, str(error), 400, len(message.input_ids)))
            return
        except Exception as error:  # concerns this request alone: the others go on
            logger.exception("request %s cannot be taken", message.rid)
            self.outputs.append(aborted(message.rid, f"internal error: {error}", 500))
            return
        seed = message.sampling_params.seed
        seed = self.seeds.getrandbits(63) if seed is None else wrap_int64(seed + message.choice)
        req = Req.from_input(message, seed)
        self.requests[req.rid] = req
        self.queue.waiting.append(req)

    def validate(self, message: TokenizedGenerateReqInput) -> None:
        """Raises ValueError naming what makes the request impossible."""
        if message.rid in self.requests:
            raise ValueError(f"rid {message.rid!r} belongs to a request that is still running")
        self.limits.check(message)

    def abort_request(self, message: AbortReq) -> None:
        """Ends requests as they stand; one that is not there has finished."""
        reqs = [self.requests[rid] for rid in dict.fromkeys(message.rids) if rid in self.requests]
        self.queue.remove({req for req in reqs if req.req_pool_idx is None})
        for req in reqs:
            self.end(req, {"type": "abort", "message": "aborted on request"})

    def flush_cache(self, message: FlushCacheReqInput) -> None:
        if self.is_idle:
            self.memory.flush()
        text = "" if self.is_idle else f"{len(self.requests)} requests are not finished"
        self.link.send(FlushCacheReqOutput(message.request_id, self.is_idle, text))

    def send_internal_state(self, message: GetInternalStateReq) -> None:
        self.link.send(GetInternalStateReqOutput(message.request_id, self.internal_state()))

    def internal_state(self) -> dict[str, Any]:
        page_size = self.worker.page_size
        available, evictable = self.memory.allocator.available, self.memory.cache.evictable_pages
        used = (self.worker.num_pages - available - evictable) * page_size
        return self.worker.internal_state() | {
            "num_running_reqs": len(self.running) + (self.queue.partial is not None),
            "num_waiting_reqs": len(self.queue.waiting),
            "available_pages": available,
            "evictable_pages": evictable,
            "total_pages": self.worker.num_pages,
            "page_size": page_size,
            "context_len": self.worker.context_len,
            "max_total_num_tokens": self.limits.max_total_num_tokens,
            "num_used_tokens": used,
            "token_usage": used / self.limits.max_total_num_tokens,
            "kv_available_tokens": available * page_size,
            "kv_evictable_tokens": evictable * page_size,
            "cache_hit_rate": self.queue.cache_hit_rate,
            "num_retractions": self.num_retractions,
            "num_retracted_input_tokens": self.num_retracted_input_tokens,
            "num_retracted_output_tokens": self.num_retracted_output_tokens,
            "leak": self.leak,
            "gen_throughput": self.throughput.tokens_per_second,
            "last_gen_throughput": self.throughput.tokens_per_second,  # SGLang's name
        }

    # Scheduling

    def schedule_decode(self) -> list[Req]:
        """All running requests, with pages for the positions that the step may write."""
        for req in list(self.running):
            while req.req_pool_idx is not None and not self.memory.reserve(
                req, req.kv_len + self.worker.lookahead
            ):
                self.retract(self.running[-1])
        return list(self.running)

    def can_run_ahead(self) -> bool:
        """Whether the next step may be launched while the tokens of one are not known: there are slots for
        both, also at the end of the context."""
        lookahead = self.worker.lookahead
        return all(
            req.kv_len + lookahead <= self.worker.context_len
            and not req.return_logprob  # they are read from what the next step overwrites
            and self.memory.reserve(req, req.kv_len + 2 * lookahead)
            for req in self.running
        )

    def retract(self, req: Req) -> None:
        self.num_retractions += 1
        self.num_retracted_input_tokens += len(req.input_ids)
        self.num_retracted_output_tokens += len(req.output_ids)
        logger.info("retracted request %s at %d tokens: the cache is full", req.rid, req.seqlen)
        self.running.remove(req)
        self.memory.release(req)
        self.queue.waiting.appendleft(req)

    # Results

    def process_prefill(self, chunks: list[PrefillChunk], output: StepOutput) -> None:
        for i, chunk in enumerate(chunks):
            req = chunk.req
            req.kv_len += len(chunk.tokens)
            self.memory.share(req)
            if output.input_logprobs is not None and not req.output_ids:
                req.input_logprobs += output.input_logprobs[i]
            if chunk.next_token is not None:
                self.queue.partial = req
                continue
            bisect.insort(self.running, req, key=lambda r: r.arrival)
            self.append_tokens(req, output.tokens[i], output.logprobs and output.logprobs[i])

    def process_decode(self, reqs: list[Req], output: StepOutput) -> None:
        for i, req in enumerate(reqs):
            if req.finish_reason is not None:  # while the step was under way
                continue
            req.kv_len += len(output.tokens[i])
            req.spec_verify_ct += self.speculates
            self.append_tokens(req, output.tokens[i], output.logprobs and output.logprobs[i])

    def append_tokens(self, req: Req, tokens: list[int], logprobs: list[TokenLogprob] | None) -> None:
        """Takes tokens up to the first that ends the request; what was speculated beyond it is dropped."""
        if req.sampling_params.max_new_tokens == 0:
            self.finish(req, {"type": "length", "length": 0})
            return
        reason: dict[str, Any] | None = None
        try:
            for i, token in enumerate(tokens):
                req.output_ids.append(token)
                if req.return_token_sources:  # a step's last token is the target's own
                    req.output_token_sources.append((i + 1) % len(tokens))
                if req.return_logprob:
                    assert logprobs is not None, "the worker returned no logprobs"
                    entry = logprobs[i]  # `top` is as long as the longest that anybody asked for
                    req.output_logprobs.append(
                        TokenLogprob(entry.token_id, entry.logprob, entry.top[: req.top_logprobs_num])
                    )
                if (reason := self.stops.check(req)) is not None:
                    break
        except Exception as error:
            self.fail(req, error)
            return
        if reason is not None:
            self.finish(req, reason)
        elif req.stream or req.num_sent == 0:
            self.outputs.append(req.next_output())

    def fail(self, req: Req, error: Exception) -> None:
        """Ends the one request that the error concerns: the others go on."""
        logger.error("request %s failed", req.rid, exc_info=error)
        self.finish(req, {"type": "abort", "message": f"internal error: {error}", "status_code": 500})

    def finish(self, req: Req, reason: dict[str, Any]) -> None:
        if req.req_pool_idx is None:
            self.queue.remove({req})
        self.end(req, reason)

    def end(self, req: Req, reason: dict[str, Any]) -> None:
        """Of a request that does not wait."""
        req.finish_reason = reason
        self.outputs.append(req.next_output())
        del self.requests[req.rid]
        if req.req_pool_idx is None:
            return
        if req is self.queue.partial:
            self.queue.partial = None
        else:
            self.running.remove(req)
        self.memory.release(req)

    def send_outputs(self) -> None:
        if self.outputs:
            self.link.send(BatchOutput(self.outputs))
            self.outputs = []
            if self.is_idle:
                self.leak = None if self.memory.is_balanced else self.check_memory()
                if self.leak is not None:
                    logger.error("memory is not accounted for: %s", self.leak)

    def check_memory(self) -> str | None:
        """What is wrong with the pages and the request slots of an idle scheduler; None: all are there."""
        return self.memory.check()
