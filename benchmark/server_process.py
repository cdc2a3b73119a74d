"""Servers that a benchmark starts, waits for and ends, with all processes that they started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAG = "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA"
START_TIMEOUT = 600.0
END_TIMEOUT = 20.0
POLL_S = 0.2


class ServerFailed(RuntimeError):
    """A server did not start; the message says how, and where its log is."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def our_command(model_path: str, device: str, port: int | str, flags: Sequence[str]) -> list[str]:
    """The command line of this tree's server; its environment is `our_environment`."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model_path]
    return [*command, "--device", device, "--port", str(port), *flags]


def our_environment(precompute: bool) -> dict[str, str]:
    """This tree's server, with the kernels that are installed, or else those that were built in the tree."""
    installed = any(metadata.distributions(name="sgl-kernel-nsa"))
    kernels = [] if installed else [str(ROOT / "sgl-kernel" / "python")]
    path = os.pathsep.join([str(ROOT / "python"), *kernels, *sys.path])
    return {FLAG: str(int(precompute)), "PYTHONPATH": path}


@dataclass(frozen=True)
class ServerProcess:
    """A command that was started, and what it serves."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path | None
    below: set[int] = field(default_factory=set)  # seen below it when it was asked to end

    def terminate(self) -> None:
        """Asks it to end, without waiting. A shell that ends leaves what it started without a parent: those
        are noted first, for the end of the context."""
        self.below.update(children(self.process.pid))
        self.process.terminate()

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Until `/health` answers 200. Raises ServerFailed where that does not come."""
        deadline = time.monotonic() + timeout
        where = f"; see {self.log}" if self.log else ""
        while True:
            if (code := self.process.poll()) is not None:
                raise ServerFailed(f"the server ended with exit code {code}{where}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"the server did not answer within {timeout:g} s{where}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                    if response.status == 200:
                        return
            except OSError:  # not there yet, or an error status
                pass
            time.sleep(POLL_S)


@contextmanager
def started(
    command: Sequence[str] | str, port: int, env: Mapping[str, str], log: Path | None = None
) -> Iterator[ServerProcess]:
    """Runs the command (a string: in a shell), which serves that port, until the context ends.

    `log` takes what it writes; without one it goes where the benchmark's own output goes.
    """
    with log.open("wb") if log else nullcontext() as out:
        process = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            env=os.environ | env,
            stdout=out,
            stderr=subprocess.STDOUT if out else None,
        )
        server = ServerProcess(process, f"http://127.0.0.1:{port}", log)
        try:
            yield server
        finally:
            _end(server)


def children(pid: int) -> list[int]:
    """All processes below one (Linux), those that called setsid too."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [p for child in map(int, below) for p in (child, *children(child))]


def _end(server: ServerProcess) -> None:
    """Asks the command to end, and then whatever it started and left behind."""
    server.terminate()
    try:
        server.process.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    below = list(server.below)
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [pid for pid in below if send_signal(pid, number)]
        deadline = time.monotonic() + END_TIMEOUT / 2
        while left and time.monotonic() < deadline:
            time.sleep(POLL_S / 4)
            left = [pid for pid in left if send_signal(pid, 0)]
        below = left


def send_signal(pid: int, number: int) -> bool:
    """Whether the process is still there (a zombie, which init or its parent will reap, is not)."""
    try:
        os.kill(pid, number)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
