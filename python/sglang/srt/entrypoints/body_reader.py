"""Reads the bodies of requests: bounded in size, in time, in the number of values, and all together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from fastapi import Request
from starlette.requests import ClientDisconnect

from sglang.srt.entrypoints.request_body import B, parse_body
from sglang.srt.errors import RequestError

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 << 20
MAX_BUFFERED_BYTES = 128 << 20  # of all bodies that are being read or parsed, before a long one is refused
# While JSON is parsed nothing else runs in the process. So much of it takes less than 50 ms.
MAX_VALUES = 1 << 18  # numbers, strings, lists and objects
MAX_ESCAPES = 1 << 20  # backslashes
SMALL_BODY = 1 << 14  # bytes that are parsed on the event loop, and always taken
READ_TIMEOUT = 60.0  # seconds

InThread = Callable[[Callable[[], B]], Awaitable[B]]


class BodyReader:
    def __init__(self, in_thread: InThread) -> None:
        self._in_thread = in_thread
        self._buffered = 0

    async def read(self, kind: type[B], request: Request) -> B:
        """The body as a `kind`. Raises RequestError (400, 408, 413, 415, 503)."""
        _check_content_type(request)
        body = bytearray()
        try:
            await asyncio.wait_for(self._receive(request, body), READ_TIMEOUT)
            if len(body) <= SMALL_BODY:
                return parse_body(kind, body)
            return await self._in_thread(lambda: _parse_large(kind, body))
        except ClientDisconnect:
            logger.debug("a client left while it sent its body: %d bytes had come", len(body))
            raise RequestError(499, "the client disconnected") from None  # nobody reads it
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {READ_TIMEOUT:.0f} s"
            raise RequestError(408, message) from None
        finally:
            self._buffered -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        async for part in request.stream():
            body += part
            self._buffered += len(part)
            if len(body) > MAX_BODY_BYTES:
                raise RequestError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
            # Short ones go on: else a few long ones that never end would keep all others out.
            if self._buffered > MAX_BUFFERED_BYTES and len(body) > SMALL_BODY:
                raise RequestError(503, "too many long bodies are being sent at the same time")


def _check_content_type(request: Request) -> None:
    """Only JSON: a web page of another origin can send that only where the server's CORS policy lets it."""
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        message = f"the content-type must be application/json, got {given[:80]!r}"
        raise RequestError(415, message)


def _parse_large(kind: type[B], body: bytearray) -> B:
    """Counts before it parses."""
    if body.count(b"\\") > MAX_ESCAPES:
        raise RequestError(413, f"the body holds more than {MAX_ESCAPES} escaped characters")
    if body.count(b",") > MAX_VALUES:  # nearly always those of a text
        plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
        if plain.count(b'"') > 2 * MAX_VALUES or _outside_strings(plain).count(b",") > MAX_VALUES:
            raise RequestError(413, f"the body holds more than {MAX_VALUES} values")
    return parse_body(kind, body)


def _outside_strings(plain: bytearray) -> bytes:
    return b"".join(plain.split(b'"')[::2])
