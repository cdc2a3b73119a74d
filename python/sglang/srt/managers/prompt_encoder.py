"""Prompts to token ids, without holding up whoever else is served: what is long is encoded in a thread, a
piece at a time, and nothing is encoded that cannot fit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import SchedulerReady

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORT_TEXTS = 1 << 10  # characters of a whole request that are encoded at once on the event loop
PIECE = 1 << 16  # characters in one call of a thread
FIRST_LOOK = 1 << 18  # characters of a text that are encoded to see whether the whole could fit
CHECKED_AT_ONCE = 1 << 18  # tokens


class PromptEncoder:
    """Encodes and checks the prompts of a request, which waits for each of its pieces: two requests with
    much to encode take turns, and one whose client has left stops at its next piece."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, threads: Executor) -> None:
        self._tokenizer = tokenizer
        self._threads = threads
        # No token stands for more characters than it is written with.
        self._longest_token = max(map(len, tokenizer.get_vocab()))

    async def encode(
        self,
        prompts: Sequence[str | list[int]],
        limits: SchedulerReady | None,
        param: str,
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """Each prompt's tokens. Raises RequestError (400) where `param` holds one that is empty, too long, or
        has a token that the model lacks; without limits nothing is refused."""
        for prompt in prompts if limits is not None else ():
            longest = limits.max_req_input_len
            if isinstance(prompt, str) and len(prompt) > longest * self._longest_token:
                message = f"{param} has {len(prompt)} characters, which are more than {longest} tokens"
                raise RequestError.bad(message, param)
        encoded: list[list[int]] = []
        unchecked = 0
        for piece in _pieces(prompts):
            characters = sum(len(prompt) for prompt in piece if isinstance(prompt, str))
            on_loop = characters == 0 or (len(piece) == len(prompts) and characters <= SHORT_TEXTS)
            for prompt in piece if on_loop else ():
                encoded.append(self._encode(prompt, add_special_tokens))
            if not on_loop:
                if limits is not None and characters > FIRST_LOOK:
                    await self._look(piece[0], limits.max_req_input_len, param)
                encoded += await self._in_thread(piece, add_special_tokens)
            for ids in encoded[-len(piece) :]:
                if limits is not None:
                    _check(ids, limits, param)
                unchecked += len(ids)
            if unchecked > CHECKED_AT_ONCE:
                unchecked = 0
                await asyncio.sleep(0)
        return encoded

    async def _look(self, text: str, max_tokens: int, param: str) -> None:
        """Refuses a long text by its start: what comes after it adds tokens, and changes at most its last
        ones."""
        size = FIRST_LOOK
        while size < len(text):
            (ids,) = await self._in_thread([text[:size]], False)
            if len(ids) > 2 * max_tokens:
                message = f"{param} has {len(ids)} tokens in its first {size} of {len(text)} characters, "
                raise RequestError.bad(message + f"more than the longest prompt of {max_tokens}", param)
            size *= 2

    async def _in_thread(self, piece: Sequence[str | list[int]], special: bool) -> list[list[int]]:
        def encode() -> list[list[int]]:
            return [self._encode(prompt, special) for prompt in piece]

        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    def _encode(self, prompt: str | list[int], special: bool) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return self._tokenizer.encode(prompt, add_special_tokens=special)


def _check(ids: list[int], limits: SchedulerReady, param: str) -> None:
    if not ids:
        raise RequestError.bad(f"{param} must hold at least one token", param)
    vocab_size, longest = limits.vocab_size, limits.max_req_input_len
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocab_size:
            raise RequestError.bad(f"{param} holds token {token}, which is not in [0, {vocab_size})", param)
    if len(ids) > longest:
        message = f"{param} has {len(ids)} tokens, more than the longest prompt of {longest}"
        raise RequestError.bad(message, param)


def _pieces(prompts: Sequence[str | list[int]]) -> Iterator[Sequence[str | list[int]]]:
    """Runs of prompts with at most PIECE characters; one that is longer is a piece of its own."""
    start = size = 0
    for i, prompt in enumerate(prompts):
        length = len(prompt) if isinstance(prompt, str) else 0
        if i > start and size + length > PIECE:
            yield prompts[start:i]
            start, size = i, 0
        size += length
    yield prompts[start:]
