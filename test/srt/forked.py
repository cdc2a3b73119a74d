"""Processes that have imported torch and the server already: that would take most of a test's time.

They are forked from one that has done nothing else, and a server's scheduler from its HTTP process. None has
imported sgl_kernel: where a process looks for that and its libraries is what the environment of that process
says.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "sglang.srt.entrypoints.http_process",
        "sglang.srt.managers.scheduler_runner",
        "sglang.srt.managers.worker_factory",
        "transformers.tokenization_utils_tokenizers",
    ]
)


@atexit.register  # after multiprocessing's own, so before it: that waits for all that still run
def _end_all() -> None:
    for process in multiprocessing.active_children():
        process.kill()


class ForkedProcess:
    """`function(*args)` in a session of its own; stdout and stderr go to `log`. Answers as a Popen."""

    def __init__(
        self, function: Callable[..., Any], *args: Any, env: Mapping[str, str], log: Path | str
    ) -> None:
        self._process = context.Process(target=_run, args=(function, args, dict(env), str(log)))
        Path(log).touch()
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(repr(self._process), timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_code(code: str, path: Sequence[str]) -> None:
    """As `python -c` with PYTHONPATH."""
    sys.path[:0] = path
    exec(code, {"__name__": "__main__"})


def run_script(
    script: Path, *arguments: str, log: Path, env: Mapping[str, str] = os.environ
) -> tuple[int, str]:
    """As `python script arguments`. Returns the exit status, and what it printed."""
    process = ForkedProcess(exec_script, str(script), arguments, env=env, log=log)
    return process.wait(500), log.read_text()


def exec_script(script: str, arguments: Sequence[str]) -> None:
    """As `python script arguments`."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def run_server(argv: Sequence[str], constants: Mapping[str, float]) -> None:
    """As `python -m sglang.launch_server`; its scheduler is forked too where there is no CUDA to lose.

    `constants`: other values for what the modules name, by their full names.
    """
    import torch
    from sglang.launch_server import main
    from sglang.srt.entrypoints import scheduler_process

    if "cuda" not in argv or torch.version.cuda is None:
        scheduler_process.START_METHOD = "fork"
    for name, value in constants.items():
        owner, _, attribute = name.rpartition(".")
        setattr(pkgutil.resolve_name(owner), attribute, value)
    sys.argv = ["sglang.launch_server", *argv]
    sys.exit(main())


def _run(function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], log: str) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)
    try:
        function(*args)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
