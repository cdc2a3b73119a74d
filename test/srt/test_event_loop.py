"""Nothing that is asked for keeps the event loop of the HTTP process busy: no callback works for 50 ms."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from fastapi import FastAPI
from server_fixture import MODEL_NAME
from sglang.srt.entrypoints import scheduler_process
from sglang.srt.entrypoints.http_server import build_app
from sglang.srt.entrypoints.scheduler_process import SchedulerProcess
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.metrics import ServerMetrics
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.tokenizer import load_tokenizer
from test_hostile import CHAT, COMPLETIONS, GENERATE, LEAVES, LOGPROBS, ROWS, Row, chat, params

MAX_CALLBACK_S = 0.05
ATTEMPTS = 3  # a busy machine makes a callback seem long now and then, a long one is long each time
SENT_AT_ONCE = 1 << 16  # bytes of a body, as a socket gives them

IDS = [i % 250 for i in range(1900)]
TEXTS = {"return_text_in_logprobs": True}
LONG = {"max_new_tokens": 60, "ignore_eos": True}
OPENAI = {"max_tokens": 60, "ignore_eos": True}

FIRST = json.dumps(params(max_new_tokens=1)).encode()

ANSWERS = [
    Row("whole", GENERATE, lambda: {"input_ids": IDS, "sampling_params": LONG} | LOGPROBS | TEXTS, 200),
    Row(
        "many choices",
        GENERATE,
        lambda: (
            {
                "text": "hi",
                "sampling_params": LONG | {"n": 32},
                "return_logprob": True,
                "top_logprobs_num": 20,
            }
            | TEXTS
            | {"stream": True}
        ),
        200,
    ),
    Row(
        "echo",
        COMPLETIONS,
        lambda: OPENAI | {"prompt": IDS, "n": 3, "logprobs": 20, "echo": True, "stream": True},
        200,
    ),
    Row(
        "echo, whole",
        COMPLETIONS,
        lambda: OPENAI | {"prompt": IDS, "n": 6, "logprobs": 20, "echo": True},
        200,
    ),
    Row("chat", CHAT, lambda: chat(n=32, logprobs=True, top_logprobs=20, stream=True) | OPENAI, 200),
]


class Stopwatch:
    """The longest that one callback of an event loop has worked: seconds of this thread's processor time,
    which other processes of a busy machine do not lengthen."""

    def __init__(self) -> None:
        self.longest, self.who = 0.0, ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Stopwatch]:
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            start = time.thread_time()
            run(handle)
            seconds = time.thread_time() - start
            if seconds > self.longest:
                self.longest, self.who = seconds, repr(handle)

        asyncio.Handle._run = timed  # type: ignore[method-assign]
        try:
            yield self
        finally:
            asyncio.Handle._run = run  # type: ignore[method-assign]


async def post(app: FastAPI, path: str, body: bytes) -> tuple[int, int]:
    """The status and the length of the answer, as a server drives the application."""
    parts = [body[i : i + SENT_AT_ONCE] for i in range(0, len(body), SENT_AT_ONCE)]
    status, length = 0, 0

    async def receive() -> dict[str, Any]:
        if parts:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        return await asyncio.Future()  # the client stays

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, length
        status = message.get("status", status)
        length += len(message.get("body", b""))
        await asyncio.sleep(0)  # as a socket that is written to

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {
        "query_string": b"",
        "headers": headers,
        "scheme": "http",
        "root_path": "",
        "asgi": {"version": "3.0"},
    }
    await app(scope | {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}, receive, send)
    return status, length


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(asyncio.sleep(0.1))
    loop.close()


@pytest.fixture(scope="module")
def app(dummy_model: Path, loop: asyncio.AbstractEventLoop) -> Iterator[FastAPI]:
    """The application in this process, over a scheduler process."""
    args = ServerArgs(
        model_path=str(dummy_model),
        device="cpu",
        served_model_name=MODEL_NAME,
        max_total_tokens=16384,
        speculative_algorithm="NEXTN",
        speculative_num_steps=3,
    )
    ports = PortArgs.init_new()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_process, "START_METHOD", forked.context.get_start_method())
        scheduler = SchedulerProcess(args, ports)
    scheduler.start()

    async def start() -> tuple[TokenizerManager, asyncio.Task[None]]:
        manager = TokenizerManager(ports, load_tokenizer(str(dummy_model)), ServerMetrics(MODEL_NAME))
        receiving = asyncio.ensure_future(manager.receive_loop())
        await asyncio.wait_for(manager.wait_ready(), 300)
        return manager, receiving

    try:
        manager, receiving = loop.run_until_complete(start())
        app = build_app(args, manager)
        gc.collect()
        gc.freeze()  # what this test process holds beside the application
        yield app
        receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(receiving)
        manager.close()
    finally:
        scheduler.stop()


@pytest.mark.parametrize(
    "row", [*ANSWERS, *(row for row in ROWS if row.status != LEAVES)], ids=lambda row: row.name
)
def test_no_callback_works_for_long(app: FastAPI, loop: asyncio.AbstractEventLoop, row: Row) -> None:
    """Bug: 18.9 KB that asked for prompt logprobs kept the loop busy for 27 s, 512 prompts for 2.4 s."""
    content = row.content()
    loop.run_until_complete(post(app, row.path, FIRST))  # first times are over
    for _ in range(ATTEMPTS):
        gc.collect()
        with Stopwatch().running() as watch:
            status, length = loop.run_until_complete(asyncio.wait_for(post(app, row.path, content), 240))
        assert status == row.status and length > 0
        if watch.longest < MAX_CALLBACK_S:
            return
    raise AssertionError(f"{watch.longest:.3f} s: {watch.who}")
