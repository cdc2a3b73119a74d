"""The HTTP process's side of the engine: checks and tokenizes requests, hands them to the scheduler, and
turns its tokens back into text."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from sglang.srt.errors import RequestError
from sglang.srt.managers.detokenizer import OutputText
from sglang.srt.managers.generation import Event, Generation, SequenceState
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchOutput,
    BatchTokenizedGenerateReqInput,
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
from sglang.srt.managers.prompt_encoder import PromptEncoder
from sglang.srt.metrics import ABORTED, ServerMetrics
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Event", "Generation", "TokenizerManager"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

THREADS = 2  # for what would hold up the event loop
CONTROL_TIMEOUT = 60.0  # seconds; the scheduler answers between two steps
STATE_TIMEOUT = 5.0
SILENCE_TIMEOUT = 5.0  # seconds without a sign of life from the scheduler
MAX_TOKEN_TEXTS = 1 << 17
MAX_HELD_TOKENS = 1 << 24  # of the prompts of all that runs or waits: up to a gigabyte in both processes
MAX_HELD_SEQUENCES = 1 << 16
RID_TIMEOUT = 1.0  # seconds; a client that comes back may be faster than the end of its old connection


class TokenizerManager:
    """Owns the tokenizer, both sockets and the table of running sequences. All in one event loop."""

    def __init__(
        self,
        port_args: PortArgs,
        tokenizer: PreTrainedTokenizerBase,
        metrics: ServerMetrics,
    ) -> None:
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.started = time.time()
        self.limits: SchedulerReady | None = None  # known when the scheduler is ready
        self.failure: RequestError | None = None  # set when nothing can be served any more
        self.draining: RequestError | None = None  # set when nothing new is begun
        self._heard_at = time.monotonic()  # the scheduler's last sign of life
        self._last_state: dict[str, Any] = {}
        self._running: dict[str, SequenceState] = {}  # by the server's own rid
        self._held_tokens = 0  # of their prompts
        self._named: defaultdict[str, set[str]] = defaultdict(set)  # a client's rid -> the server's
        self._answers: dict[str, asyncio.Future[Any]] = {}
        self._ready: asyncio.Future[SchedulerReady] = asyncio.get_running_loop().create_future()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="work")
        self.token_text = functools.lru_cache(MAX_TOKEN_TEXTS)(lambda token_id: tokenizer.decode([token_id]))
        self._encoder = PromptEncoder(tokenizer, self._threads)
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

    async def encode(
        self, prompts: Sequence[str | list[int]], param: str, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Each prompt's tokens. Raises RequestError (400) that names `param` where one cannot be served."""
        return await self._encoder.encode(prompts, self._limits(), param, add_special_tokens)

    async def tokenize(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """As they are, whether or not they can be served."""
        return await self._encoder.encode(texts, None, "", add_special_tokens)

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def check(
        self, length: int, params: SamplingParams, has_limit: bool, names: dict[str, str]
    ) -> SamplingParams:
        """The parameters to generate with after a prompt of `length` tokens. Raises RequestError (400) that
        names what is out of range.

        Without a limit of its own (`has_limit` false) a request gets at most the room that is left.
        `names` translates parameters to what the client calls them: its keys are SamplingParams' fields
        and `input_ids`.
        """
        longest = self._limits().max_req_input_len
        room = longest + 1 - length  # the last token that is generated needs no place in the cache
        if has_limit and params.max_new_tokens > room:
            prompt, limit = (names.get(name, name) for name in ("input_ids", "max_new_tokens"))
            raise RequestError.bad(
                f"{limit} is {params.max_new_tokens}, but {prompt} has {length} tokens, which leaves "
                f"room for {room} of {longest + 1}",
                limit,
            )
        if params.max_new_tokens > room:
            params = msgspec.structs.replace(params, max_new_tokens=room)
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
        if self.draining is not None:
            raise self.draining
        prompts = {id(r.input_ids): r for r in requests}  # choices share theirs: counted with one of them
        self._check_room(sum(len(r.input_ids) for r in prompts.values()), len(requests))
        events: asyncio.Queue[Any] = asyncio.Queue()
        states = [
            SequenceState(
                index,
                r,
                frozenset(own),
                OutputText(self.tokenizer, r.sampling_params, r.return_token_sources),
                events,
                held_tokens=len(r.input_ids) if prompts[id(r.input_ids)] is r else 0,
            )
            for index, (r, own) in enumerate(zip(requests, names, strict=True))
        ]
        self._send(BatchTokenizedGenerateReqInput.pack(requests))
        if not self._running:
            self.metrics.rate.begin()
        for state in states:
            self._running[state.request.rid] = state
            for name in state.names:
                self._named[name].add(state.request.rid)
            self._held_tokens += state.held_tokens
            self.metrics.prompt_tokens.inc(len(state.request.input_ids))
        return Generation(self, states)

    def _check_room(self, tokens: int, sequences: int) -> None:
        """Whatever the clients send, what waits here fits into memory. Raises RequestError (503)."""
        for held, new, most, what in (
            (self._held_tokens, tokens, MAX_HELD_TOKENS, "prompt tokens"),
            (len(self._running), sequences, MAX_HELD_SEQUENCES, "sequences"),
        ):
            if held and held + new > most:
                message = f"{held} {what} run or wait: there is no room for {new} more, at most {most}"
                raise RequestError(503, message)

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

    def drop(self, rids: Sequence[str], outcome: str) -> None:
        """Nobody waits for these sequences any more; what the scheduler still sends of them is dropped."""
        left = [rid for rid in rids if rid in self._running]
        for rid in left:
            self._forget(rid)
            self.metrics.count_request(outcome)
        if left:
            with contextlib.suppress(RequestError):  # a scheduler that is gone has nothing to abort
                self._send(AbortReq(left))

    async def abort(self, name: str | None) -> int:
        """Ends what has this name, or with None all, as it stands. Returns how many, when they have ended.

        Who waits for one of these gets what was generated, and an abort as its finish reason. Raises
        RequestError (503).
        """
        rids = list(self._running if name is None else self._named.get(name, ()))
        states = [self._running[rid] for rid in rids]
        if states:
            self._send(AbortReq(rids))
            await self._within(asyncio.gather(*(state.ended.wait() for state in states)), CONTROL_TIMEOUT)
        return len(states)

    def _forget(self, rid: str) -> SequenceState:
        state = self._running.pop(rid)
        self._held_tokens -= state.held_tokens
        for name in state.names:
            self._named[name].discard(rid)
            if not self._named[name]:
                del self._named[name]
        state.ended.set()
        return state

    def _limits(self) -> SchedulerReady:
        assert self.limits is not None, "the server serves after the scheduler is ready"
        return self.limits

    @property
    def vocab_size(self) -> int:
        return self._limits().vocab_size

    @property
    def context_length(self) -> int:
        return self._limits().context_length

    @property
    def num_running(self) -> int:
        return len(self._running)

    # -- control ----------------------------------------------------------------------------------------

    async def flush_cache(self) -> FlushCacheReqOutput:
        request_id = new_rid()
        return await self._ask(request_id, FlushCacheReqInput(request_id))

    async def internal_state(self) -> dict[str, Any]:
        """The scheduler's; where it does not answer, the last that is known."""
        request_id = new_rid()
        silent = time.monotonic() - self._heard_at > SILENCE_TIMEOUT
        try:
            timeout = 0.0 if silent else STATE_TIMEOUT
            answer = await self._ask(request_id, GetInternalStateReq(request_id), timeout)
            self._last_state = answer.internal_state
        except RequestError:
            pass
        return self._last_state

    async def _ask(self, request_id: str, message: ToScheduler, timeout: float = CONTROL_TIMEOUT) -> Any:
        self._check_alive()
        self._answers[request_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(message)
            return await self._within(self._answers[request_id], timeout)
        finally:
            del self._answers[request_id]

    @staticmethod
    async def _within(answer: Awaitable[T], timeout: float) -> T:
        try:
            return await asyncio.wait_for(answer, timeout)
        except asyncio.TimeoutError:
            raise RequestError(503, f"the scheduler did not answer within {timeout:.0f} s") from None

    # -- the scheduler ----------------------------------------------------------------------------------

    async def wait_ready(self) -> SchedulerReady:
        """Raises RequestError with the scheduler's reason if it failed to start."""
        self.limits = await asyncio.shield(self._ready)
        return self.limits

    def check_health(self) -> None:
        """Raises RequestError (503) where nothing is served, or nothing new."""
        self._check_alive()
        if self.draining is not None:
            raise self.draining
        silence = time.monotonic() - self._heard_at
        if silence > SILENCE_TIMEOUT:
            raise RequestError(503, f"the scheduler has given no sign of life for {silence:.0f} s")

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def drain(self, message: str, timeout: float) -> None:
        """Nothing new is begun; returns when all that runs has finished, or after the timeout in seconds."""
        self.draining = RequestError(503, message)
        deadline = time.monotonic() + timeout
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

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
            self._heard_at = time.monotonic()
            match message:
                case BatchOutput(outputs=outputs):
                    for output in outputs:
                        self._on_output(output)
                    await asyncio.sleep(0)  # many pieces may be there at once
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
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._from_scheduler.close(linger=0)
        self._to_scheduler.close(linger=0)
