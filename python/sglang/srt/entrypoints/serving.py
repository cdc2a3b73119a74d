"""What every way of asking for text shares: prompts to checked requests, and events to an HTTP answer."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sglang.srt.entrypoints.choice import Choice
from sglang.srt.entrypoints.request_body import MAX_SEQUENCES
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.tokenizer_manager import Generation, TokenizerManager

logger = logging.getLogger(__name__)
T = TypeVar("T")


MAX_LOGPROBS = 1 << 20  # of one request, those of the most likely tokens included
SMALL_ANSWER = 4096  # tokens
JSON_DEPTH = 3  # choices, choice, logprobs
JSON_SLICE = 64  # members of a list
JSON_BLOCK = 1 << 18  # bytes

to_json: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def pack_json(value: Any) -> msgspec.Raw:
    """A value whose JSON is made once, however often it is sent."""
    return msgspec.Raw(to_json(value))


@dataclass(frozen=True)
class LogprobOptions:
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0


def check_batch(prompts: int, choices: int, param: str) -> None:
    """Before anything is done for one of them. Raises RequestError (400)."""
    if prompts * choices > MAX_SEQUENCES:
        message = f"{param} holds {prompts} prompts with n={choices}: at most {MAX_SEQUENCES} in one request"
        raise RequestError.bad(message, param)


def check_logprobs(sequences: Sequence[TokenizedGenerateReqInput], names: dict[str, str]) -> None:
    """How many logprobs an answer may hold. One sequence alone may have as many as it generates tokens.

    `names` are the client's, as for TokenizerManager.check. Raises RequestError (400).
    """
    scored = [s for s in sequences if s.return_logprob]
    of_prompt = sum(
        (len(s.input_ids) - s.logprob_start_len) * (1 + s.top_logprobs_num)
        for s in scored
        if s.logprob_start_len >= 0
    )
    generated = sum(s.sampling_params.max_new_tokens * (1 + s.top_logprobs_num) for s in scored)
    limit = f"at most {MAX_LOGPROBS} in one request"
    top, start, new, n = (
        names.get(name, name) for name in ("top_logprobs_num", "logprob_start_len", "max_new_tokens", "n")
    )
    if of_prompt > MAX_LOGPROBS:
        raise RequestError.bad(f"{start} and {top} ask for {of_prompt} prompt logprobs: {limit}", start)
    if generated > MAX_LOGPROBS and len(scored) > 1:
        message = f"{n}, {new} and {top} ask for {generated} logprobs in {len(scored)} sequences: {limit}"
        raise RequestError.bad(message, new)


async def collect(generation: Generation, choices: list[Choice]) -> None:
    """Waits for all of it."""
    async for event in generation:
        choices[event.index].add(event.output, event.text, event.text_offsets)


async def answer(
    request: Request,
    manager: TokenizerManager,
    generation: Generation,
    choices: list[Choice],
    whole: Callable[[], Any],
) -> Response:
    """The answer in one piece; a client that leaves before frees its sequences.

    `whole` makes the answer of the finished choices. What may be large is made in a thread.
    """

    async def encoded() -> list[bytes]:
        await collect(generation, choices)
        tokens = sum(len(choice.output_ids) for choice in choices)
        if tokens <= SMALL_ANSWER and not any(choice.request.return_logprob for choice in choices):
            return [to_json(whole())]
        return await manager.in_thread(functools.partial(_json_blocks, whole))

    try:
        blocks = await until_disconnect(request, encoded())
    finally:
        generation.close()
    if len(blocks) == 1:
        return Response(blocks[0], media_type="application/json")
    headers = {"content-length": str(sum(map(len, blocks)))}
    return StreamingResponse(_each(blocks), media_type="application/json", headers=headers)


async def _each(blocks: list[bytes]) -> AsyncIterator[bytes]:
    for block in blocks:
        yield block


def _json_blocks(whole: Callable[[], Any]) -> list[bytes]:
    """The JSON of a large value. Other threads get their turn between its pieces."""
    blocks = [bytearray()]
    for piece in _json_pieces(whole(), JSON_DEPTH):
        if len(blocks[-1]) > JSON_BLOCK:
            blocks.append(bytearray())
        blocks[-1] += piece
    return [bytes(block) for block in blocks]


def _json_pieces(value: Any, depth: int) -> Iterator[bytes]:
    """The pieces of to_json(value): members of objects down to `depth`, slices of lists."""
    if depth and isinstance(value, dict) and value:
        for i, (key, member) in enumerate(value.items()):
            yield (b"," if i else b"{") + to_json(key) + b":"
            yield from _json_pieces(member, depth - 1)
        yield b"}"
    elif depth and isinstance(value, list) and value and isinstance(value[0], dict):
        for i, member in enumerate(value):
            yield b"," if i else b"["
            yield from _json_pieces(member, depth - 1)
        yield b"]"
    elif isinstance(value, list) and len(value) > JSON_SLICE:
        for start in range(0, len(value), JSON_SLICE):
            yield (b"," if start else b"[") + to_json(value[start : start + JSON_SLICE])[1:-1]
        yield b"]"
    else:
        yield to_json(value)


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of the work, which is cancelled where the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestError(499, "the client disconnected")  # nobody reads it
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of a generation; however the stream ends, the generation is closed."""

    def __init__(self, generation: Generation, chunks: AsyncIterator[Any]) -> None:
        super().__init__(_events(chunks), media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _events(chunks: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield b"data: " + to_json(chunk) + b"\n\n"
    except RequestError as error:  # the status is long sent, so the error is an event
        yield b"data: " + to_json(error.body()) + b"\n\n"
    except Exception:
        logger.exception("a stream failed")
        yield b"data: " + to_json(RequestError(500, "internal error").body()) + b"\n\n"
    yield b"data: [DONE]\n\n"
