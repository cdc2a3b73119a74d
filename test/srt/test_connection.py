"""Connections: who is one too many, says nothing or reads nothing is hung up on; nobody else is."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import uvicorn
from sglang.srt.entrypoints.connection import BoundedProtocol, logger
from sglang.srt.logging_config import Seldom

TIMEOUT = 0.4  # seconds
SLOW = 3 * TIMEOUT
LARGE = 24 << 20  # bytes: more than the kernel takes for a client that does not read
PART = 1 << 20
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["path"] in ("/large", "/parts"):
        sizes = [LARGE] if scope["path"] == "/large" else [PART] * (LARGE // PART)
        headers = [(b"content-length", str(LARGE).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for left, size in zip(reversed(range(len(sizes))), sizes):
            await send({"type": "http.response.body", "body": b"x" * size, "more_body": left > 0})
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(SLOW)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def serving(most: int) -> Iterator[int]:
    """A server in this process; gives its port."""

    class Quick(BoundedProtocol):
        limit = most
        header_timeout = TIMEOUT
        unread_timeout = SLOW

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http=Quick, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(100) as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def read_until_closed(connection: socket.socket) -> bytes:
    """Raises TimeoutError where the server does not close it."""
    received = b""
    try:
        while part := connection.recv(1 << 16):
            received += part
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize(
    ("sent", "answers"),
    [(b"", 0), (GET[:20], 0), (GET, 1), (GET + GET, 2), (GET + GET[:20], 1)],
    ids=["nothing", "half a head", "a request", "two requests", "a request and a half"],
)
def test_who_asks_for_nothing_is_hung_up_on(port: int, sent: bytes, answers: int) -> None:
    """Bug: connections with half a head were held for ever."""
    with connect(port) as connection:
        start = time.monotonic()
        connection.sendall(sent)
        assert read_until_closed(connection).count(b"HTTP/1.1 200 OK") == answers
        assert time.monotonic() - start >= TIMEOUT * 0.9


def test_who_waits_for_an_answer_is_not(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(GET.replace(b"/", b"/slow", 1))
        assert read_until_closed(connection).endswith(b"ok")


def test_who_reads_nothing_is_hung_up_on(port: int) -> None:
    """Bug: an answer in parts was held for ever for a client that did not read it."""
    with connect(port) as connection:
        connection.sendall(GET.replace(b"/", b"/parts", 1))
        time.sleep(2.5 * SLOW)
        assert len(read_until_closed(connection)) < LARGE


def test_who_reads_slowly_gets_the_whole_answer(port: int) -> None:
    """Bug: what was left of an answer was dropped 10 s after the server had written the last of it."""
    with connect(port) as connection:
        connection.sendall(GET.replace(b"/", b"/large", 1))
        received, start = 0, time.monotonic()
        while time.monotonic() - start < 1.5 * SLOW:
            received += len(connection.recv(PART // 2))
            time.sleep(TIMEOUT / 4)
        assert received < LARGE, "it was not slow"
        assert received + len(read_until_closed(connection)) > LARGE


def test_more_connections_than_there_may_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a lack of files wrote 57 MB of log. Those above the limit are closed at once, with one line."""
    monkeypatch.setattr(logger, "filters", [Seldom()])
    with serving(2) as port, caplog.at_level(logging.WARNING):
        served = [connect(port) for _ in range(2)]
        for connection in served:
            connection.sendall(GET)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        for _ in range(5):
            with connect(port) as refused:
                assert read_until_closed(refused) == b""
        for connection in served:
            connection.close()
    assert [record.message for record in caplog.records] == [
        "more than 2 connections: those above are closed"
    ]
