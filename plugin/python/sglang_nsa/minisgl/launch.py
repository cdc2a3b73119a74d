"""mini-sglang's server with `install()` in every one of its schedulers, which are spawned."""

from __future__ import annotations

import sys
from typing import Any

from .hooks import install
from .settings import Mode


def run_scheduler(*args: Any) -> None:
    """mini-sglang's own `_run_scheduler`, in a new process that has nothing of the launcher's."""
    from minisgl.server import launch

    install()
    launch._run_scheduler(*args)


def main() -> None:
    """Takes mini-sglang's arguments from the command line."""
    try:
        mode = Mode.from_environment()
        from minisgl.server import launch
    except (ValueError, ImportError) as error:
        sys.exit(f"sglang_nsa.minisgl: {error}")
    if mode is not Mode.OFF:
        launch._run_scheduler = run_scheduler  # looked up when a scheduler is started
    launch.launch_server()
