"""The life of the two processes: keys, signals, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from server_fixture import RunningServer, free_port, is_running, launch, start_process, wait_gone
from sglang.srt.entrypoints.http_server import bind
from sglang.srt.server_args import ServerArgs

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
        headers = {"Authorization": "Bearer secret"}
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
    time.sleep(0.5)
    os.kill(server.scheduler_pid, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
    whole, stream = sorted(answers, key=lambda a: a.status_code, reverse=True)
    assert whole.status_code == 503 and "scheduler" in whole.json()["error"]["message"]
    assert '"server_error"' in stream.text and stream.text.endswith("data: [DONE]\n\n")
    assert server.process.wait(10) == 1
    assert "the scheduler process ended (exit code -9)" in server.log.read_text()


def test_death_of_the_http_process(dummy_model: Path, tmp_path: Path) -> None:
    with launch(dummy_model, tmp_path / "log") as server:
        scheduler = server.scheduler_pid
        assert is_running(scheduler)
        server.process.kill()
        wait_gone(scheduler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_both(dummy_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """As Ctrl-C in a terminal: the whole group gets the signal, also while a stream is open."""
    with launch(dummy_model, tmp_path / "log") as server, server.client() as client:
        with client.stream("POST", "/generate", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            if number == signal.SIGINT:
                os.killpg(server.process.pid, number)
            else:
                server.process.send_signal(number)
            rest = "".join(lines)
        assert "shutting down" in rest
        assert server.process.wait(15) == 0
        wait_gone(server.scheduler_pid)
        log = server.log.read_text()
        assert "Traceback" not in log and "leaked" not in log, log


def test_signal_while_loading(dummy_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start_process(dummy_model, log, free_port())
    while "scheduler: pid" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    scheduler = RunningServer("", process, log).scheduler_pid
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 0, log.read_text()
    wait_gone(scheduler)
    assert "Traceback" not in log.read_text()


def test_taken_port_is_an_error_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start_process(tmp_path, tmp_path / "log", port)
        assert process.wait(60) == 1
        assert f"--port {port}" in (tmp_path / "log").read_text()


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
    with bind(args) as listener:
        assert asyncio.run(accepted_without_delay())


@pytest.mark.parametrize(
    "flags,message",
    [(("--context-length", "999999"), "context"), (("--model-path", "/nowhere"), "/nowhere")],
    ids=["context", "path"],
)
def test_failed_start_says_why(
    dummy_model: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    process = start_process(dummy_model, tmp_path / "log", free_port(), *flags)
    assert process.wait(60) == 1
    log = (tmp_path / "log").read_text()
    assert message in log.split("cannot start:")[1]
