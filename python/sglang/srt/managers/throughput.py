"""How fast the scheduler generates."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

THROUGHPUT_WINDOW_S = 2.0


class Throughput:
    """Generated tokens per second of work, over a window of it."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._tokens = 0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float, running: int, waiting: int) -> None:
        """What a step of so many seconds generated."""
        self._tokens += tokens
        self._seconds += seconds
        if self._seconds < THROUGHPUT_WINDOW_S:
            return
        self.tokens_per_second = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        logger.info("decode: %d running, %d waiting, %.1f tokens/s", running, waiting, self.tokens_per_second)
