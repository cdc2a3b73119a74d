"""Connections: how many there may be, and how long one may take to ask, and to read what it is told."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from sglang.srt.logging_config import Seldom

logger = logging.getLogger(__name__)
logger.addFilter(Seldom())

HEADER_TIMEOUT = 10.0  # seconds from a connection, or its last answer, to the end of the next request's head
UNREAD_TIMEOUT = 60.0  # seconds in which a client takes at least something of what was sent to it
MAX_CONNECTIONS = 4096
ACCEPTED_AT_ONCE = 64  # connections taken from the kernel before one that is too many is closed
OTHER_FILES = 64  # descriptors that the process needs beside its connections


def max_connections() -> int:
    """As many as the process's limit of open files has room for, after raising that as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + ACCEPTED_AT_ONCE + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        wanted = raised
    return max(1, wanted - ACCEPTED_AT_ONCE - OTHER_FILES)


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on whoever is one too many, does not say what it wants, or does not read."""

    limit = MAX_CONNECTIONS
    header_timeout = HEADER_TIMEOUT
    unread_timeout = UNREAD_TIMEOUT

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes that the client had still to take when the deadline was set

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limit:
            logger.warning("more than %d connections: those above are closed", self.limit)
            transport.abort()
            return
        self._wait_for_client()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More is to be read than there is room for."""
        self._wait_for_client()
        super().pause_writing()

    def on_response_complete(self) -> None:
        self._wait_for_client()
        super().on_response_complete()

    def _wait_for_client(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._unread = self.transport.get_write_buffer_size()
        timeout = self.unread_timeout if self._unread else self.header_timeout
        self._deadline = self.loop.call_later(timeout, self._hang_up_unless_active)

    def _hang_up_unless_active(self) -> None:
        unread = self.transport.get_write_buffer_size()
        asked = self.cycle is not None and not self.cycle.response_complete
        if 0 < unread < self._unread:
            self._wait_for_client()
        elif unread or not asked:
            self.transport.abort()
