"""Verification on during mixed load. What was seen is printed every half minute: a cut-off costs little."""

from __future__ import annotations

import re
import time

import load
from servers import Server

REPORT_S = 30


class Soak:
    """One server under load for `seconds`."""

    def __init__(self, server: Server, seconds: float) -> None:
        self.server, self.started, self.seconds = server, time.monotonic(), seconds
        self.load = load.Mixed(server.port, seconds)
        self._due = REPORT_S

    def report(self, last: bool = False) -> None:
        """Prints where it is, if that is due."""
        passed = time.monotonic() - self.started
        if not last and passed < self._due:
            return
        self._due += REPORT_S
        print(
            f"{self.server.name}: {passed:.0f} s of mixed load, {self.load.counts}, "
            f"{self.verified()} replays verified, {len(self.differences())} differences",
            flush=True,
        )

    def verified(self) -> int:
        """As the server last said, which it does every 500 replays."""
        said = self.server.says(r"replays verified without a difference", 1)
        return int(re.search(r"(\d+) replays", said[0]).group(1)) if said else 0

    def differences(self) -> list[str]:
        return self.server.says("MetadataMismatch|stale or wrong", 20)

    def end(self) -> None:
        self.load.join(15)
        self.report(last=True)
        for line in [*self.load.failures[:5], *self.differences(), *self.server.says("Traceback|Error:", 3)]:
            print(f"    {line}", flush=True)


def soak(servers: list[Server], seconds: float) -> None:
    soaks = [Soak(server, seconds) for server in servers]
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(1)
        for one in soaks:
            one.report()
    for one in soaks:
        one.end()
