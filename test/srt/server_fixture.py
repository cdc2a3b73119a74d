"""A real server for tests: both processes, on a free port, with a small random model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from forked import ForkedProcess, run_server

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 300.0
MODEL_NAME = "dummy"
Process = subprocess.Popen[bytes] | ForkedProcess
SPECULATIVE_FLAGS = ("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "3")
COMPUTED_ONCE = {"SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA": "1"}


@dataclass
class RunningServer:
    url: str
    process: Process
    log: Path

    @property
    def scheduler_pid(self) -> int:
        """From the log line that announces it."""
        return int(self.log.read_text().split("scheduler: pid ")[1].split(")")[0])

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(**({"base_url": self.url, "timeout": 60} | options))

    def internal_state(self) -> dict[str, object]:
        with self.client() as client:
            return client.get("/get_server_info").raise_for_status().json()["internal_states"][0]

    def wait_state(self, timeout: float = 20.0, **expected: object) -> dict[str, object]:
        """Polls until the scheduler's state has these values."""
        deadline = time.monotonic() + timeout
        while True:
            state = self.internal_state()
            if all(state[name] == value for name, value in expected.items()):
                return state
            assert time.monotonic() < deadline, f"not reached in {timeout} s: {expected}, but {state}"
            time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_process(
    model: Path,
    log: Path,
    port: int,
    *flags: str,
    as_command: bool = False,
    constants: Mapping[str, float] = MappingProxyType({}),
    **env: str,
) -> Process:
    """`as_command`: by `python -m`, as users do; else forked from a process that has imported it, where
    `constants` of the modules may have other values (`forked.run_server`)."""
    argv = ["--model-path", str(model), "--port", str(port), "--device", "cpu"]
    argv += ["--served-model-name", MODEL_NAME, "--max-total-tokens", "16384", *flags]
    path = [str(ROOT / "python"), str(ROOT / "sgl-kernel" / "python"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    if not as_command:
        return ForkedProcess(run_server, argv, dict(constants), env=environment | env, log=log)
    command = [sys.executable, "-m", "sglang.launch_server", *argv]
    with log.open("wb") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment | env, start_new_session=True
        )


@contextmanager
def launch(model: Path, log: Path, *flags: str, **options: Any) -> Iterator[RunningServer]:
    """A server that answers; ended when the context ends, whatever happened to it. `options`: as of
    `start_process`."""
    with starting(model, log, *flags, **options) as server:
        wait_ready(server)
        yield server


@contextmanager
def starting(model: Path, log: Path, *flags: str, **options: Any) -> Iterator[RunningServer]:
    """As `launch`, while it loads still."""
    port = free_port()
    host = "[::1]" if "::1" in flags else "127.0.0.1"
    process = start_process(model, log, port, *flags, **options)
    server = RunningServer(f"http://{host}:{port}", process, log)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.process.pid, signal.SIGKILL)
            raise


def wait_ready(server: RunningServer) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        assert server.process.poll() is None, f"the server ended:\n{server.log.read_text()}"
        assert time.monotonic() < deadline, f"the server is not ready:\n{server.log.read_text()}"
        try:
            if httpx.get(server.url + "/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Also false for a process that ended and is not waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int, timeout: float = 15.0) -> None:
    deadline = time.monotonic() + timeout
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs after {timeout} s"
        time.sleep(0.05)
