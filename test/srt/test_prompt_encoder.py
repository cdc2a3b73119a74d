"""Prompts to tokens: what is long is refused before it is encoded, or given up when nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import (
    BatchTokenizedGenerateReqInput,
    SchedulerReady,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.prompt_encoder import FIRST_LOOK, PIECE, PromptEncoder
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.tokenizer import load_tokenizer

LONGEST = 100  # tokens of a prompt
LONGEST_TOKEN = "x" * 5000
LIMITS = SchedulerReady(1024, LONGEST, LONGEST + 1, 320)


class CountingTokenizer:
    """A tokenizer that notes what it encodes, and does `work` for each text first."""

    def __init__(self, model: Path, longest_token: str, work: Callable[[], Any]) -> None:
        self.tokenizer = load_tokenizer(str(model))
        self.longest_token, self.work = longest_token, work
        self.encoded: list[int] = []  # characters of each text

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.get_vocab() | {self.longest_token: 10**6}

    def encode(self, text: str, **options: Any) -> list[int]:
        self.work()
        self.encoded.append(len(text))
        return self.tokenizer.encode(text, **options)


@pytest.fixture
def encoder(dummy_model: Path) -> Iterator[tuple[PromptEncoder, CountingTokenizer]]:
    """Of a tokenizer of bytes."""
    with ThreadPoolExecutor(1) as threads:
        tokenizer = CountingTokenizer(dummy_model, LONGEST_TOKEN, lambda: None)
        yield PromptEncoder(tokenizer, threads), tokenizer


def test_prompts_are_what_the_tokenizer_makes_of_them(
    encoder: tuple[PromptEncoder, CountingTokenizer],
) -> None:
    texts = ["one", "y" * LONGEST, *(f"number {i}" for i in range(PIECE // 9))]
    ids = asyncio.run(encoder[0].encode([*texts, [1, 2]], LIMITS, "text"))
    assert ids == [*map(encoder[1].tokenizer.encode, texts), [1, 2]]


@pytest.mark.parametrize(
    ("text", "said", "most"),  # characters that are encoded
    [
        (LONGEST_TOKEN * LONGEST + "x", "text has 500001 characters, which are more than 100", 0),
        (LONGEST_TOKEN * LONGEST, "text has 262144 tokens in its first 262144 of 500000", FIRST_LOOK),
        ("x" * (LONGEST + 1), "text has 101 tokens, more than the longest prompt of 100", LONGEST + 1),
    ],
)
def test_a_long_text_is_refused_before_it_is_encoded(
    encoder: tuple[PromptEncoder, CountingTokenizer], text: str, said: str, most: int
) -> None:
    """Bug: 30 MB of text for a context of 4,096 tokens took minutes and 9.7 GB."""
    with pytest.raises(RequestError, match=said):
        asyncio.run(encoder[0].encode([text], LIMITS, "text"))
    assert sum(encoder[1].encoded) <= most


def test_who_left_is_not_worked_for(dummy_model: Path) -> None:
    """Bug: the work went on for minutes after the client had left, and others waited behind it."""
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(20)

    async def leave(encoder: PromptEncoder) -> None:
        task = asyncio.ensure_future(encoder.encode(["x" * PIECE] * 50, None, "text"))
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        assert await encoder.encode(["somebody else"], None, "text")

    with ThreadPoolExecutor(1) as threads:
        tokenizer = CountingTokenizer(dummy_model, "x", work)
        asyncio.run(leave(PromptEncoder(tokenizer, threads)))
    assert len(tokenizer.encoded) <= 2  # the piece that was being encoded, and somebody else's text


def test_what_sequences_share_is_sent_once() -> None:
    """Bug: 120,000 stop tokens of 2,048 sequences took 10 GB."""
    ids, params = list(range(300)), SamplingParams(stop_token_ids=tuple(range(1000)))
    requests = [
        TokenizedGenerateReqInput(rid=str(i), input_ids=ids, sampling_params=params, choice=i)
        for i in range(500)
    ]
    message = msgspec.msgpack.encode(BatchTokenizedGenerateReqInput.pack(requests))
    alone = msgspec.msgpack.encode(BatchTokenizedGenerateReqInput.pack(requests[:1]))
    assert len(message) - len(alone) < 500 * 200
    received = msgspec.msgpack.decode(message, type=BatchTokenizedGenerateReqInput)
    assert list(received.unpack()) == requests
