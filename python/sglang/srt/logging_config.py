"""One format for the logs of both processes."""

from __future__ import annotations

import logging


def configure_logging(level: str, process: str) -> None:
    """Logs of `level` and above go to stderr, marked with the name of the process."""
    form = f"[%(asctime)s {process}] %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, datefmt="%H:%M:%S", force=True)
    quiet = logging.DEBUG if level == "debug" else logging.WARNING
    for name in ("uvicorn.access", "uvicorn.error", "asyncio", "httpx"):
        logging.getLogger(name).setLevel(quiet)
