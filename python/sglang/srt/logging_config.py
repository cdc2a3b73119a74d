"""One format for the logs of both processes."""

from __future__ import annotations

import logging

from sglang.srt.errors import printable

MAX_LINE = 4000  # characters of a message; a traceback may be longer


class OneLineFormatter(logging.Formatter):
    """Each message on one line, whatever names and values of requests stand in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message, MAX_LINE)
        return super().formatMessage(record)


def configure_logging(level: str, process: str) -> None:
    """Logs of `level` and above go to stderr, marked with the name of the process."""
    form = f"[%(asctime)s {process}] %(levelname)s %(name)s: %(message)s"
    handler = logging.StreamHandler()
    handler.setFormatter(OneLineFormatter(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    quiet = logging.DEBUG if level == "debug" else logging.WARNING
    for name in ("uvicorn.access", "uvicorn.error", "asyncio", "httpx"):
        logging.getLogger(name).setLevel(quiet)
