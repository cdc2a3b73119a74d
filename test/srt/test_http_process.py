"""The life of the two processes: keys, signals, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from server_fixture import (
    COMPUTED_ONCE,
    SPECULATIVE_FLAGS,
    Process,
    RunningServer,
    free_port,
    is_running,
    launch,
    start_process,
    wait_gone,
    wait_ready,
)
from sglang.srt.entrypoints.http_process import listen
from sglang.srt.server_args import ServerArgs

LIMITS = {  # soon reached
    "sglang.srt.entrypoints.connection.BoundedProtocol.header_timeout": 4.0,  # s
    "sglang.srt.managers.tokenizer_manager.SILENCE_TIMEOUT": 2.5,  # s
    "sglang.srt.managers.tokenizer_manager.MAX_HELD_TOKENS": 1000,
    "sglang.srt.managers.tokenizer_manager.MAX_HELD_SEQUENCES": 8,
    "sglang.srt.entrypoints.body_reader.MAX_BUFFERED_BYTES": 40_000,
}
LONG = {"text": "x", "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}


def test_api_key_and_death_of_the_scheduler(dummy_model: Path, tmp_path: Path) -> None:
    with launch(dummy_model, tmp_path / "log", "--api-key", "secret") as server:
        check_api_key(server)
        check_death_of_the_scheduler(server)


def check_api_key(server: RunningServer) -> None:
    with server.client() as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/get_server_info", "/v1/models"):
                assert client.get(path, headers=headers).status_code == 401
            response = client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
        for path in ("/health", "/metrics"):
            assert client.get(path).status_code == 200
        for scheme in ("bearer", "BEARER", "Bearer"):
            headers = {"Authorization": f"{scheme} secret"}
            assert client.get("/v1/models", headers=headers).status_code == 200
        body = {"prompt": "x", "max_tokens": 2}
        assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        info = client.get("/get_server_info", headers=headers).text
        assert "secret" not in info and '"api_key":"***"' in info


def check_death_of_the_scheduler(server: RunningServer) -> None:
    """Requests that run are answered with an error, and the HTTP process ends with one."""
    headers = {"Authorization": "Bearer secret"}
    answers: list[httpx.Response] = []

    def ask(stream: bool) -> None:
        with server.client(headers=headers) as client:
            answers.append(client.post("/generate", json=LONG | {"stream": stream}))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    with server.client(headers=headers) as client:
        running, deadline = 0, time.monotonic() + 20
        while running < 2:
            running = client.get("/get_server_info").json()["internal_states"][0]["num_running_reqs"]
            assert time.monotonic() < deadline, f"{running} of 2 requests run"
    os.kill(server.scheduler_pid, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
    whole, stream = sorted(answers, key=lambda a: a.status_code, reverse=True)
    assert whole.status_code == 503 and "scheduler" in whole.json()["error"]["message"]
    assert '"server_error"' in stream.text and stream.text.endswith("data: [DONE]\n\n")
    assert server.process.wait(10) == 1
    assert "the scheduler process ended (exit code -9)" in server.log.read_text()


def test_interrupt_in_a_terminal(dummy_model: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group, here while a stream is open that does not end in time. The server is
    started by the command that users start it with."""
    flags = ("--drain-timeout", "0.5", *SPECULATIVE_FLAGS)
    command = launch(dummy_model, tmp_path / "log", *flags, as_command=True, **COMPUTED_ONCE)
    with command as server, server.client() as client:
        # Bug: what chose the tokenizer imported torch, half of what the HTTP process did to start.
        assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
        with client.stream("POST", "/generate", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            os.killpg(server.process.pid, signal.SIGINT)
            rest = "".join(lines)
        assert "shutting down" in rest
        assert server.process.wait(15) == 0
        wait_gone(server.scheduler_pid)
        log = server.log.read_text()
        assert not [word for word in ("Traceback", "leaked", "did not end") if word in log], log


def test_signal_while_loading(dummy_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start_process(dummy_model, log, free_port(), as_command=True)
    while "scheduler: pid" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    scheduler = RunningServer("", process, log).scheduler_pid
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 0, log.read_text()
    wait_gone(scheduler)
    assert "Traceback" not in log.read_text() and "ready" not in log.read_text()


def test_answers_leave_at_once() -> None:
    """Bug: Nagle's algorithm stayed on, and every whole answer's body waited 40 ms behind its headers."""

    async def accepted_without_delay() -> bool:
        connected: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            connected.set_result(bool(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        async with await asyncio.start_server(accept, sock=listener):
            await asyncio.open_connection("127.0.0.1", args.port)
            return await connected

    args = ServerArgs(model_path="unused", device="cpu", port=free_port())
    with listen(args) as listener:
        assert asyncio.run(accepted_without_delay())


@dataclass(frozen=True)
class BadStart:
    flags: tuple[str, ...] = ()
    config: Any = None  # of config.json: None as it is, a dict to be merged in, or what it holds instead
    said: tuple[str, ...] = ()


BAD_STARTS = {
    "context too long": BadStart(("--context-length", "999999"), said=("context", "999999")),
    "no such path": BadStart(("--model-path", "/nowhere"), said=("/nowhere",)),
    "context of one": BadStart(("--context-length", "1"), said=("--context-length", "got 1")),
    "tiny cache": BadStart(
        ("--max-total-tokens", "2", "--page-size", "1", *SPECULATIVE_FLAGS), said=("--max-total-tokens 2",)
    ),
    "many steps": BadStart(
        ("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "100000"), said=("steps", "100000")
    ),
    "no object": BadStart(config=[1, 2], said=("config.json", "object", "[1, 2]")),
    "text for a number": BadStart(
        config={"vocab_size": "many"}, said=("config.json", "vocab_size", "'many'")
    ),
    "a number for an object": BadStart(config={"rope_parameters": 7}, said=("config.json", "rope_par", "7")),
    "no cuda": BadStart(("--device", "cuda"), said=("--device cuda",)),
}


@pytest.mark.parametrize("case", BAD_STARTS.values(), ids=list(BAD_STARTS))
def test_failed_start_says_why_in_one_line(dummy_model: Path, tmp_path: Path, case: BadStart) -> None:
    if "cuda" in case.flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    model = dummy_model
    if case.config is not None:
        model = tmp_path / "model"
        shutil.copytree(dummy_model, model)
        file = model / "config.json"
        merged = json.loads(file.read_text()) | case.config if isinstance(case.config, dict) else case.config
        file.write_text(json.dumps(merged))
    process = start_process(model, tmp_path / "log", free_port(), *case.flags)
    assert process.wait(120) != 0
    log = (tmp_path / "log").read_text()
    (line,) = [line for line in log.splitlines() if "INFO" not in line and "usage:" not in line]
    assert all(word in line for word in case.said), log


def test_two_servers_on_one_port_and_death_of_the_http_process(dummy_model: Path, tmp_path: Path) -> None:
    """Bug: both bound the port, and the second found out when its model was loaded. What happens to the
    first is the other test: its scheduler ends when the HTTP process is killed."""
    port = free_port()
    logs = {start_process(dummy_model, log, port): log for log in (tmp_path / "log0", tmp_path / "log1")}
    try:
        refused = wait_any(*logs)
        log = logs[refused].read_text()
        assert refused.returncode == 1 and f"--port {port}" in log
        assert "loading" not in log and "Traceback" not in log
        (process,) = logs.keys() - {refused}
        server = RunningServer(f"http://127.0.0.1:{port}", process, logs[process])
        wait_ready(server)
        assert is_running(server.scheduler_pid)
        process.kill()
        wait_gone(server.scheduler_pid)
    finally:
        for process in logs:
            process.terminate()
            process.wait(30)


def wait_any(*processes: Process) -> Process:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in processes:
            if process.poll() is not None:
                return process
        time.sleep(0.05)
    raise AssertionError("both run")


def test_strangers_and_the_end(dummy_model: Path, tmp_path: Path) -> None:
    """What is done to one server, in order; the last is its end."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    options = {"constants": LIMITS, "TMPDIR": str(folder)}
    with launch(dummy_model, tmp_path / "log", "--host", "::1", **options) as server:
        size = server.log.stat().st_size
        with half_sent_headers(server):
            check_cut_bodies(server)
            check_held_bodies(server)
            check_nonsense(server)
            check_stopped_scheduler(server)
            check_no_room(server)
        assert server.log.stat().st_size - size < 2000
        check_drain(server)


def raw_connection(server: RunningServer, sent: bytes) -> socket.socket:
    connection = socket.create_connection(("::1", httpx.URL(server.url).port))
    connection.sendall(sent)
    return connection


@contextlib.contextmanager
def half_sent_headers(server: RunningServer) -> Iterator[None]:
    """Bug: they were held for ever, and a lack of files wrote 57 MB of log. Here they are hung up on while
    other things happen."""
    start = time.monotonic()
    connections = [raw_connection(server, b"POST /generate HTTP/1.1\r\nHost: x\r\n") for _ in range(400)]
    with server.client() as client:
        assert client.get("/health").status_code == 200
    yield
    for connection in connections:
        connection.settimeout(max(0.1, start + 30 - time.monotonic()))
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        connection.close()


def check_cut_bodies(server: RunningServer) -> None:
    """Bug: two tracebacks for each."""
    size = server.log.stat().st_size
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for _ in range(5):
        raw_connection(server, head + b'Content-Length: 5000\r\n\r\n{"text": "x').close()
    with server.client() as client:
        assert client.get("/health").status_code == 200
    time.sleep(0.5)
    assert server.log.stat().st_size == size, server.log.read_text()[size:]


def check_held_bodies(server: RunningServer) -> None:
    """Bug: a few bodies that never ended kept the short ones of all others out as well."""
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    held = raw_connection(server, head + b"Content-Length: 50000\r\n\r\n" + b" " * 39_900)
    with held, server.client() as client:
        body = {"input_ids": [5] * 100, "sampling_params": {"max_new_tokens": 1}}
        for padding, status in ((30_000, 503), (0, 200)):
            content = json.dumps(body).encode() + b" " * padding
            answer = client.post("/generate", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == status, answer.text


def check_nonsense(server: RunningServer) -> None:
    """Bug: a line of the log for each request that was none, and two for each wish for a WebSocket."""
    upgrade = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    for sent in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", upgrade) * 30:
        with raw_connection(server, sent) as connection:
            assert connection.recv(8) == b"HTTP/1.1"


def check_stopped_scheduler(server: RunningServer) -> None:
    """Bug: /health said 200 for ever."""
    with server.client() as client:
        before = client.get("/get_server_info").json()["internal_states"][0]
        os.kill(server.scheduler_pid, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + 15
            while (health := client.get("/health")).status_code == 200:
                assert time.monotonic() < deadline, "/health says 200 of a stopped scheduler"
                time.sleep(0.2)
            assert health.status_code == 503 and "sign of life" in health.json()["error"]["message"]
            assert client.get("/metrics", timeout=10).status_code == 200
            info = client.get("/get_server_info", timeout=10).json()
            assert info["internal_states"][0]["total_pages"] == before["total_pages"]
        finally:
            os.kill(server.scheduler_pid, signal.SIGCONT)
        deadline = time.monotonic() + 15
        while client.get("/health").status_code != 200:
            assert time.monotonic() < deadline, "/health does not recover"
            time.sleep(0.1)


def check_no_room(server: RunningServer) -> None:
    """Bug: as much waited as clients sent, whatever the memory."""
    waits = {"sampling_params": {"max_new_tokens": 1000, "ignore_eos": True, "n": 3}, "stream": True}
    with server.client() as client:
        with client.stream("POST", "/generate", json=waits | {"input_ids": [5] * 900}) as response:
            lines = response.iter_lines()
            next(lines)  # 900 tokens, which its 3 sequences share, are held
            fits = {"input_ids": [5] * 100, "sampling_params": {"max_new_tokens": 1}}
            assert client.post("/generate", json=fits).status_code == 200
            for prompts, what in (([[5] * 200], "prompt tokens"), ([[5]] * 6, "sequences")):
                refused = client.post("/generate", json={"input_ids": prompts})
                assert refused.status_code == 503 and f" {what} run or wait" in refused.text
        server.wait_state(num_running_reqs=0)
        body = {"input_ids": [[5] * 500] * 3, "sampling_params": {"max_new_tokens": 1}}
        assert client.post("/generate", json=body).status_code == 200  # alone it has room


def check_drain(server: RunningServer) -> None:
    """Bug: a second SIGTERM killed the process, and its sockets' folder stayed."""
    folders = server.log.parent / "tmp"
    assert list(folders.glob("sglang-*"))
    body = {"text": "x", "sampling_params": {"max_new_tokens": 60, "ignore_eos": True}, "stream": True}
    with server.client() as client, server.client() as other:
        other.get("/health")  # a connection that stays
        with client.stream("POST", "/generate", json=body) as response:
            lines = filter(None, response.iter_lines())
            next(lines)
            for _ in range(3):
                os.killpg(server.process.pid, signal.SIGTERM)
                time.sleep(0.02)
            *_, last, done = lines
        with contextlib.suppress(httpx.TransportError):  # it may have ended by now
            assert other.post("/generate", json=body).status_code == 503
    assert json.loads(last.removeprefix("data: "))["meta_info"]["finish_reason"]["type"] == "length"
    assert done == "data: [DONE]"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0, server.log.read_text()
    wait_gone(server.scheduler_pid)
    assert not list(folders.glob("sglang-*"))
    assert "Traceback" not in server.log.read_text()
