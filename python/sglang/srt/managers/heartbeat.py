"""The scheduler process's sign of life."""

from __future__ import annotations

import contextlib
import threading
import time

import msgspec
import zmq

from sglang.srt.managers.io_struct import Heartbeat
from sglang.srt.server_args import PortArgs

PERIOD = 0.5  # seconds


class HeartbeatSender(threading.Thread):
    """Tells the HTTP process that this one lives: a thread of its own, since a step may take long."""

    def __init__(self, port_args: PortArgs) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._address = port_args.tokenizer_ipc_name

    def run(self) -> None:
        socket = zmq.Context().socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 2)  # a process that does not listen needs no more
        socket.connect(self._address)
        message = msgspec.msgpack.encode(Heartbeat())
        while True:
            with contextlib.suppress(zmq.Again):
                socket.send(message, zmq.NOBLOCK)
            time.sleep(PERIOD)
