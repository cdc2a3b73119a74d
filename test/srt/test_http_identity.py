"""Who gets which tokens: rids that are used again, late outputs, aborts."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from server_fixture import RunningServer

GENERATE = "/generate"
LONG = {"text": "x", "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True, "temperature": 0}}
SHORT = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 0}


def leave(server: RunningServer, body: dict[str, Any], delay: float) -> None:
    """Sends a request and closes the connection without reading."""
    content = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(delay)


def test_a_rid_that_comes_back_gets_its_own_answer(server: RunningServer) -> None:
    """Bug: rids were the scheduler's ids too. Who left and came back with the same rid got a 500, or the
    tokens of the prompt of before."""
    rng = random.Random(3)
    with server.client() as client:
        prompts = [f"prompt number {i}" for i in range(4)]
        bodies = [{"text": prompt, "sampling_params": SHORT} for prompt in prompts]
        expected = [client.post(GENERATE, json=body).json()["output_ids"] for body in bodies]
        for round_ in range(60):
            i = round_ % len(prompts)
            stream = {"stream": bool(rng.getrandbits(1))}
            leave(server, LONG | {"text": prompts[i - 1], "rid": "same"} | stream, rng.random() * 0.03)
            answer = client.post(GENERATE, json=bodies[i] | {"rid": "same"})
            assert answer.status_code == 200, answer.text
            assert answer.json()["output_ids"] == expected[i]
            assert answer.json()["meta_info"]["id"] == "same"
    start = time.monotonic()
    server.wait_state(num_running_reqs=0, num_waiting_reqs=0, leak=None)
    assert time.monotonic() - start < 5, "an orphan runs on"


@contextmanager
def asked(server: RunningServer, *bodies: dict[str, Any]) -> Iterator[Callable[[], list[httpx.Response]]]:
    """Requests that run in threads; the function waits for their answers."""
    answers: dict[int, httpx.Response] = {}

    def ask(i: int, body: dict[str, Any]) -> None:
        with server.client() as client:
            answers[i] = client.post(body.pop("path", GENERATE), json=body)

    threads = [threading.Thread(target=ask, args=(i, dict(body))) for i, body in enumerate(bodies)]
    for thread in threads:
        thread.start()

    def join() -> list[httpx.Response]:
        for thread in threads:
            thread.join(20)
        return [answers[i] for i in range(len(bodies))]

    yield join


@pytest.mark.parametrize(
    "abort", [{"rid": "doomed"}, {"abort_all": True}, {"rid": "", "abort_all": True}], ids=str
)
def test_abort_ends_in_the_scheduler_and_answers_with_the_text_so_far(
    server: RunningServer, abort: dict[str, Any]
) -> None:
    """Bug: the answer came empty at once, while the scheduler still worked; `rid: ""` was refused."""
    server.wait_state(num_running_reqs=0, num_waiting_reqs=0)
    choices = LONG | {"sampling_params": LONG["sampling_params"] | {"n": 2}}
    with asked(server, choices | {"rid": "doomed"}) as join, server.client() as client:
        server.wait_state(num_running_reqs=2)
        time.sleep(0.2)
        assert client.post("/abort_request", json={"rid": "nobody"}).json() == {"aborted": 0}
        assert client.post("/abort_request", json=abort).json() == {"aborted": 2}
        state = server.internal_state()
        assert (state["num_running_reqs"], state["num_waiting_reqs"]) == (0, 0)
        (answer,) = join()
        whole = client.post(GENERATE, json=LONG | {"sampling_params": SHORT | {"max_new_tokens": 60}}).json()
    assert answer.status_code == 200
    for choice in answer.json():
        assert choice["meta_info"]["finish_reason"]["type"] == "abort"
        count = choice["meta_info"]["completion_tokens"]
        assert 1 < count == len(choice["output_ids"])
        assert choice["output_ids"][:60] == whole["output_ids"][:count]
        assert choice["text"][:20] == whole["text"][: len(choice["text"])][:20] != ""
    assert server.internal_state()["leak"] is None


def test_abort_by_the_id_of_an_openai_answer(server: RunningServer) -> None:
    server.wait_state(num_running_reqs=0, num_waiting_reqs=0)
    body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "n": 2, "stream": True}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
        lines = filter(None, stream.iter_lines())
        first = json.loads(next(lines).removeprefix("data: "))
        with server.client() as other:
            assert other.post("/abort_request", json={"rid": first["id"]}).json() == {"aborted": 2}
        *_, last, done = lines
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"


def test_a_rid_in_use_is_refused(server: RunningServer) -> None:
    with asked(server, LONG | {"rid": "taken"}) as join, server.client() as client:
        server.wait_state(num_running_reqs=1)
        answer = client.post(GENERATE, json=LONG | {"rid": "taken"})
        assert answer.status_code == 400 and "'taken' is in use" in answer.json()["error"]["message"]
        assert client.post("/abort_request", json={"rid": "taken"}).json() == {"aborted": 1}
        join()
