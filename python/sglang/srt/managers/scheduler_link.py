"""How the scheduler receives requests and sends tokens: within one process, or over ZeroMQ."""

from __future__ import annotations

import logging
import os
from collections import deque
from typing import Protocol

import msgspec
import zmq

from sglang.srt.managers.io_struct import BatchOutput, FromScheduler, PackedSequence, ReqOutput, ToScheduler
from sglang.srt.server_args import PortArgs

logger = logging.getLogger(__name__)

PARENT_CHECK_MS = 1000
LINGER_MS = 1000  # what was sent may take so long to be delivered when the process ends


class SchedulerLink(Protocol):
    def receive(self, block: bool) -> list[ToScheduler]:
        """All messages that are there. With `block`, waits for the first one."""
        ...

    def send(self, message: FromScheduler) -> None: ...


class LocalLink:
    """Both ends in one process. Never blocks: whoever runs the scheduler's steps also fills the inbox."""

    def __init__(self) -> None:
        self.inbox: deque[ToScheduler] = deque()
        self.outbox: deque[FromScheduler] = deque()

    def receive(self, block: bool) -> list[ToScheduler]:
        return [self.inbox.popleft() for _ in range(len(self.inbox))]  # others may be adding

    def send(self, message: FromScheduler) -> None:
        self.outbox.append(message)


class ParentDied(Exception):
    """The process that started the scheduler is gone; nobody is left to serve."""


class ZmqLink:
    """The scheduler's end of the two sockets that the tokenizer process binds."""

    def __init__(self, port_args: PortArgs) -> None:
        self._parent_pid = os.getppid()
        self._context = zmq.Context(io_threads=1)
        self._context.linger = LINGER_MS  # the default waits for ever for a reader that is gone
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.connect(port_args.scheduler_input_ipc_name)
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.connect(port_args.tokenizer_ipc_name)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToScheduler)

    def receive(self, block: bool) -> list[ToScheduler]:
        """As in the protocol. Raises ParentDied."""
        self._check_parent()
        while block and not self._inbox.poll(PARENT_CHECK_MS):
            self._check_parent()
        messages: list[ToScheduler] = []
        while self._inbox.poll(0):
            raw = self._inbox.recv()
            try:
                messages.append(self._decoder.decode(raw))
            except msgspec.DecodeError as error:
                self._refuse(raw, error)
        return messages

    def send(self, message: FromScheduler) -> None:
        for piece in message.pieces() if isinstance(message, BatchOutput) else (message,):
            self._outbox.send(self._encoder.encode(piece))

    def close(self) -> None:
        """Delivers what was sent, for at most LINGER_MS."""
        self._context.destroy()

    def _check_parent(self) -> None:
        if os.getppid() != self._parent_pid:
            raise ParentDied(f"the parent process {self._parent_pid} died")

    def _refuse(self, raw: bytes, error: msgspec.DecodeError) -> None:
        """Aborts the sequences that a message of the wrong shape is about. Raises if it is about none."""
        content = msgspec.msgpack.decode(raw)
        try:
            rids = [PackedSequence(*sequence).others["rid"] for sequence in content["sequences"]]
        except (TypeError, KeyError):
            raise error from None
        logger.error("%d sequences cannot be read: %s", len(rids), error)
        message = f"the request cannot be read: {error}"
        self.send(BatchOutput([aborted(str(rid), message, 400) for rid in rids]))


def aborted(rid: str, message: str, status_code: int, prompt_tokens: int = 0) -> ReqOutput:
    """The last output of a request that the scheduler does not, or no longer, keep."""
    return ReqOutput(
        rid=rid,
        output_ids=[],
        finish_reason={"type": "abort", "message": message, "status_code": status_code},
        prompt_tokens=prompt_tokens,
        completion_tokens=0,
        cached_tokens=0,
        spec_verify_ct=0,
    )
