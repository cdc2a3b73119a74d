"""The HTTP process's side of the engine: checks and tokenizes requests, hands them to the scheduler, and
turns its tokens back into text."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio
from transformers import PreTrainedTokenizerBase

from sglang.srt.errors import RequestError
from sglang.srt.managers.detokenizer import OutputText
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchOutput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    FromScheduler,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    ReqOutput,
    SchedulerFailed,
    SchedulerReady,
    TokenizedGenerateReqInput,
    ToScheduler,
    new_rid,
)
from sglang.srt.metrics import ABORTED, ServerMetrics
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs

logger = logging.getLogger(__name__)
T = TypeVar("T")

LONG_TEXT = 1 << 14  # characters; longer texts are tokenized off the event loop
CONTROL_TIMEOUT = 60.0  # seconds; the scheduler answers between two steps
RID_TIMEOUT = 1.0  # seconds; a client that comes back may be faster than the end of its old connection


@dataclass
class Event:
    """What is new of one sequence of a generation."""

    index: int  # which of the generation's requests
    text: str
    text_offsets: list[int]  # as OutputText.take_offsets says
    output: ReqOutput


@dataclass
class SequenceState:
    """One sequence that the scheduler works on."""

    index: int
    request: TokenizedGenerateReqInput
    names: frozenset[str]  # what its client calls it: its rid, and the rid of the request that it is part of
    text: OutputText
    events: asyncio.Queue[tuple[SequenceState, ReqOutput] | RequestError]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    created: float = field(default_factory=time.perf_counter)
    last_output: float = 0.0


class Generation:
    """The sequences of one HTTP request, running together. Iterate over it once; always close it.

    Closing what is not finished aborts it in the scheduler at once; closing needs no event loop, so it
    also works while a task is being cancelled.
    """

    def __init__(self, manager: TokenizerManager, states: Sequence[SequenceState]) -> None:
        self._manager = manager
        self._states = {state.request.rid: state for state in states}
        self._events = states[0].events

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Raises RequestError where a sequence cannot be completed."""
        while self._states:
            event = await self._events.get()
            if isinstance(event, RequestError):
                raise event
            state, output = event
            if output.finish_reason is not None:
                del self._states[output.rid]
            text = state.text.feed(output.output_ids, output.finish_reason)
            yield Event(state.index, text, state.text.take_offsets(), output)

    def close(self, outcome: str = "disconnect") -> None:
        for rid in self._states:
            self._manager.drop(rid, outcome)
        self._states.clear()


class TokenizerManager:
    """Owns the tokenizer, both sockets and the table of running sequences. All in one event loop."""

    def __init__(
        self,
        port_args: PortArgs,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        metrics: ServerMetrics,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.metrics = metrics
        self.started = time.time()
        self.limits: SchedulerReady | None = None  # known when the scheduler is ready
        self.failure: RequestError | None = None  # set when nothing can be served any more
        self._running: dict[str, SequenceState] = {}  # by the server's own rid
        self._named: defaultdict[str, set[str]] = defaultdict(set)  # a client's rid -> the server's
        self._answers: dict[str, asyncio.Future[Any]] = {}
        self._ready: asyncio.Future[SchedulerReady] = asyncio.get_running_loop().create_future()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromScheduler).decode
        # Queues are unbounded: a send must neither block the loop nor lose a message.
        context = zmq.asyncio.Context.instance()
        self._from_scheduler = context.socket(zmq.PULL)
        self._from_scheduler.setsockopt(zmq.RCVHWM, 0)
        self._from_scheduler.bind(port_args.tokenizer_ipc_name)
        self._to_scheduler = zmq.Context.instance().socket(zmq.PUSH)
        self._to_scheduler.setsockopt(zmq.SNDHWM, 0)
        self._to_scheduler.setsockopt(zmq.LINGER, 0)
        self._to_scheduler.bind(port_args.scheduler_input_ipc_name)

    # -- requests ---------------------------------------------------------------------------------------

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        def encode() -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        if len(text) < LONG_TEXT:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._pool, encode)

    def check(
        self, input_ids: list[int], params: SamplingParams, has_limit: bool, names: dict[str, str]
    ) -> SamplingParams:
        """The parameters to generate with. Raises RequestError (400) that names what is out of range.

        Without a limit of its own (`has_limit` false) a request gets at most the room that is left.
        `names` translates parameters to what the client calls them: its keys are SamplingParams' fields
        and `input_ids`.
        """
        prompt, limit_name = (
            names.get("input_ids", "input_ids"),
            names.get("max_new_tokens", "max_new_tokens"),
        )
        if not input_ids:
            raise RequestError.bad(f"{prompt} must hold at least one token", prompt)
        wrong = next((t for t in input_ids if not 0 <= t < self.vocab_size), None)
        if wrong is not None:
            raise RequestError.bad(
                f"{prompt} holds token {wrong}, which is not in [0, {self.vocab_size})", prompt
            )
        assert self.limits is not None, "the server listens after the scheduler is ready"
        length, longest = len(input_ids), self.limits.max_req_input_len
        if length > longest:
            raise RequestError.bad(
                f"{prompt} has {length} tokens, more than the longest prompt of {longest}", prompt
            )
        room = longest + 1 - length  # the last token that is generated needs no place in the cache
        if has_limit and params.max_new_tokens > room:
            raise RequestError.bad(
                f"{limit_name} is {params.max_new_tokens}, but {prompt} has {length} tokens, which leaves "
                f"room for {room} of {longest + 1}",
                limit_name,
            )
        params = msgspec.structs.replace(params, max_new_tokens=min(params.max_new_tokens, room))
        try:
            params.validate(self.vocab_size)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            name = names.get(name, name)
            raise RequestError.bad(f"{name} {rest}", name) from error
        return params

    async def generate(
        self, requests: Sequence[TokenizedGenerateReqInput], names: Sequence[Sequence[str]]
    ) -> Generation:
        """Hands checked requests to the scheduler. Raises RequestError (400, 503).

        `names` are what the client calls each of them. A name belongs to one generation at a time, and is
        free again when that has ended.
        """
        await self._wait_for_names({name for own in names for name in own})
        self._check_alive()
        events: asyncio.Queue[Any] = asyncio.Queue()
        states = [
            SequenceState(
                index,
                r,
                frozenset(own),
                OutputText(self.tokenizer, r.sampling_params, r.return_token_sources),
                events,
            )
            for index, (r, own) in enumerate(zip(requests, names, strict=True))
        ]
        generation = Generation(self, states)
        try:
            for state in states:
                self._send(state.request)
                self._running[state.request.rid] = state
                for name in state.names:
                    self._named[name].add(state.request.rid)
                self.metrics.prompt_tokens.inc(len(state.request.input_ids))
        except RequestError:
            generation.close("error")
            raise
        return generation

    async def _wait_for_names(self, names: set[str]) -> None:
        deadline = time.monotonic() + RID_TIMEOUT
        while taken := names & self._named.keys():
            self._check_alive()
            name = min(taken)
            last = self._running[next(iter(self._named[name]))]
            try:
                await asyncio.wait_for(last.ended.wait(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise RequestError.bad(f"rid {name!r} is in use by a request that runs", "rid") from None

    def drop(self, rid: str, outcome: str) -> None:
        """Nobody waits for this sequence any more; what the scheduler still sends of it is dropped."""
        if rid in self._running:
            self._forget(rid)
            self.metrics.count_request(outcome)
            with contextlib.suppress(RequestError):  # a scheduler that is gone has nothing to abort
                self._send(AbortReq([rid]))

    async def abort(self, name: str | None) -> int:
        """Ends what has this name, or with None all, as it stands. Returns how many, when they have ended.

        Who waits for one of these gets what was generated, and an abort as its finish reason. Raises
        RequestError (503).
        """
        rids = list(self._running if name is None else self._named.get(name, ()))
        states = [self._running[rid] for rid in rids]
        if states:
            self._send(AbortReq(rids))
            await self._within_timeout(asyncio.gather(*(state.ended.wait() for state in states)))
        return len(states)

    def _forget(self, rid: str) -> SequenceState:
        state = self._running.pop(rid)
        for name in state.names:
            self._named[name].discard(rid)
            if not self._named[name]:
                del self._named[name]
        state.ended.set()
        return state

    @property
    def context_length(self) -> int:
        assert self.limits is not None, "the server listens after the scheduler is ready"
        return self.limits.context_length

    # -- control ----------------------------------------------------------------------------------------

    async def flush_cache(self) -> FlushCacheReqOutput:
        request_id = new_rid()
        return await self._ask(request_id, FlushCacheReqInput(request_id))

    async def internal_state(self) -> dict[str, Any]:
        request_id = new_rid()
        answer: GetInternalStateReqOutput = await self._ask(request_id, GetInternalStateReq(request_id))
        return answer.internal_state

    async def _ask(self, request_id: str, message: ToScheduler) -> Any:
        self._check_alive()
        self._answers[request_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(message)
            return await self._within_timeout(self._answers[request_id])
        finally:
            del self._answers[request_id]

    async def _within_timeout(self, answer: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(answer, CONTROL_TIMEOUT)
        except asyncio.TimeoutError:
            raise RequestError(503, f"the scheduler did not answer within {CONTROL_TIMEOUT:.0f} s") from None

    # -- the scheduler ----------------------------------------------------------------------------------

    async def wait_ready(self) -> SchedulerReady:
        """Raises RequestError with the scheduler's reason if it failed to start."""
        self.limits = await asyncio.shield(self._ready)
        return self.limits

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise self.failure

    def fail(self, message: str) -> None:
        """Nothing can be served any more: everybody who waits is told, and so is who comes later."""
        self.failure = self.failure or RequestError(503, message)
        for state in self._running.values():
            state.events.put_nowait(self.failure)
            state.ended.set()
        for answer in [*self._answers.values(), self._ready]:
            if not answer.done():
                answer.set_exception(self.failure)

    async def receive_loop(self) -> None:
        """Runs for the life of the process."""
        while True:
            message = self._decode(await self._from_scheduler.recv())
            match message:
                case BatchOutput(outputs=outputs):
                    for output in outputs:
                        self._on_output(output)
                case FlushCacheReqOutput() | GetInternalStateReqOutput():
                    answer = self._answers.get(message.request_id)
                    if answer is not None and not answer.done():
                        answer.set_result(message)
                case SchedulerReady():
                    self._ready.set_result(message)
                case SchedulerFailed(message=reason):
                    self.fail(f"the scheduler failed: {reason}")

    def _on_output(self, output: ReqOutput) -> None:
        state = self._running.get(output.rid)
        if state is None:
            return  # its client is gone
        if output.output_ids:
            self._observe_tokens(state, output)
        reason = output.finish_reason
        if reason is not None:
            self._forget(output.rid)
            self._observe_finish(state, output)
            if "status_code" in reason:  # not the client's wish
                state.events.put_nowait(RequestError(reason["status_code"], reason["message"]))
                return
        state.events.put_nowait((state, output))

    def _observe_tokens(self, state: SequenceState, output: ReqOutput) -> None:
        now, new = time.perf_counter(), len(output.output_ids)
        self.metrics.generation_tokens.inc(new)
        self.metrics.rate.add(new)
        if state.request.stream:
            if state.last_output:
                for _ in range(new):
                    self.metrics.inter_token_latency.observe((now - state.last_output) / new)
            else:
                self.metrics.time_to_first_token.observe(now - state.created)
        if not state.last_output:
            self.metrics.first_output(output.queue_time, output.cached_tokens)
        state.last_output = now

    def _observe_finish(self, state: SequenceState, output: ReqOutput) -> None:
        outcome = output.finish_reason["type"]
        self.metrics.count_request(outcome)
        if outcome not in ABORTED:
            latency = time.perf_counter() - state.created
            self.metrics.finished(
                latency, output.prompt_tokens, output.cached_tokens, output.completion_tokens
            )

    def _send(self, message: ToScheduler) -> None:
        try:
            self._to_scheduler.send(self._encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise RequestError(503, "the scheduler is not connected") from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._from_scheduler.close(linger=0)
        self._to_scheduler.close(linger=0)
