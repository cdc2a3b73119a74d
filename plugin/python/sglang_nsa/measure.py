"""The measuring switch: SGLang's own path and the plugin's by turns, inside one running server.

A host's speed drifts by tens of per cent in minutes, so only interleaved rounds can be compared. In the
layouts that share buffers SGLang's own path runs unchanged over the shared set: as many launches and bytes.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections import defaultdict

logger = logging.getLogger(__name__)

REPORT_EVERY = 2  # turns
SETTLE = 5  # replays after a switch that are not counted


class Alternation:
    """Host time of each replay call, and time from one call to the next, by path and batch size."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._count = 0
        self.switched = False  # whether this replay is the first of a turn
        self._started = 0.0
        self._last: tuple[int, float] | None = None  # batch size and time of the call before
        self._host: dict[tuple[int, str], list[float]] = defaultdict(list)
        self._step: dict[tuple[int, str], list[float]] = defaultdict(list)

    def begin(self, bs: int) -> bool:
        """Whether this replay is SGLang's."""
        turn, place = divmod(self._count, self.every)
        if place == 0 and turn and turn % REPORT_EVERY == 0:
            logger.info("sglang-nsa-plugin alternate %s", json.dumps(self.table()))
        self._count += 1
        own = turn % 2 == 0
        self.switched = place == 0
        now = time.perf_counter()
        if self._last is not None and self._last[0] == bs and place > SETTLE:
            self._step[bs, _name(own)].append(now - self._last[1])
        self._last = (bs, now)
        self._started = time.perf_counter()
        return own

    def end(self, bs: int, own: bool) -> None:
        taken = time.perf_counter() - self._started
        if self._count % self.every > SETTLE:
            self._host[bs, _name(own)].append(taken)

    def table(self) -> list[dict[str, float]]:
        """One row for each batch size: medians in microseconds, and SGLang's over the plugin's."""
        rows = []
        for bs in sorted({bs for bs, _ in self._host}):
            row: dict[str, float] = {"bs": bs}
            for kind, samples in (("host", self._host), ("step", self._step)):
                medians = {}
                for path in ("sglang", "plugin"):
                    values = samples.get((bs, path), [])
                    if values:
                        medians[path] = statistics.median(values) * 1e6
                        row[f"{kind}_{path}_us"] = round(medians[path], 1)
                        row[f"{kind}_{path}_n"] = len(values)
                if len(medians) == 2:
                    row[f"{kind}_ratio"] = round(medians["sglang"] / medians["plugin"], 3)
            rows.append(row)
        return rows


def _name(own: bool) -> str:
    return "sglang" if own else "plugin"
