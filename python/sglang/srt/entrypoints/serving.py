"""What every way of asking for text shares: prompts to checked requests, and events to an HTTP answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sglang.srt.entrypoints.choice import Choice
from sglang.srt.errors import RequestError
from sglang.srt.managers.tokenizer_manager import Generation, TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_SEQUENCES = 4096  # of one HTTP request

to_json: Callable[[Any], bytes] = msgspec.json.Encoder().encode


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


async def check_prompt(
    manager: TokenizerManager,
    prompt: str | list[int],
    params: SamplingParams,
    has_limit: bool,
    names: dict[str, str],
    add_special_tokens: bool = True,
) -> tuple[list[int], SamplingParams]:
    """A prompt's tokens and the parameters within the limits. Raises RequestError (400)."""
    ids = prompt if isinstance(prompt, list) else await manager.tokenize(prompt, add_special_tokens)
    return ids, manager.check(ids, params, has_limit, names)


async def collect(generation: Generation, choices: list[Choice]) -> None:
    """Waits for all of it."""
    async for event in generation:
        choices[event.index].add(event.output, event.text, event.text_offsets)


async def answer(request: Request, generation: Generation, whole: Callable[[], Awaitable[Any]]) -> Response:
    """The answer in one piece; a client that leaves before frees its sequences."""
    try:
        return Response(to_json(await _until_disconnect(request, whole())), media_type="application/json")
    finally:
        generation.close()


async def _until_disconnect(request: Request, work: Awaitable[T]) -> T:
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
