"""One format for the logs of both processes."""

from __future__ import annotations

import logging
import time

from sglang.srt.errors import printable

MAX_LINE = 4000  # characters of a message; a traceback may be longer
QUIET_S = 60.0  # seconds between two lines about the same


class OneLineFormatter(logging.Formatter):
    """Each message on one line, whatever names and values of requests stand in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message, MAX_LINE)
        return super().formatMessage(record)


class Seldom(logging.Filter):
    """Lets a warning through once in QUIET_S: for loggers whose warnings are as many as strangers like."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}  # by the message before its values are put in

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        now = time.monotonic()
        if now - self._last.get(record.msg, -QUIET_S) < QUIET_S:
            return False
        self._last[record.msg] = now
        return True


def configure_logging(level: str, process: str) -> None:
    """Logs of `level` and above go to stderr, marked with the name of the process."""
    form = f"[%(asctime)s {process}] %(levelname)s %(name)s: %(message)s"
    handler = logging.StreamHandler()
    handler.setFormatter(OneLineFormatter(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    quiet = logging.DEBUG if level == "debug" else logging.WARNING
    for name in ("uvicorn.access", "uvicorn.error", "asyncio", "httpx"):
        logging.getLogger(name).setLevel(quiet)
    logging.getLogger("uvicorn.error").addFilter(Seldom())  # a line for each request that is no HTTP
