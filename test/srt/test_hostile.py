"""What strangers send: each row gets its answer, `/health` answers within a second all the while, and neither
process grows by 300 MB."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fixture import RunningServer

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
TOKENIZE = "/tokenize"
MAX_GROWTH = 300 << 20  # bytes
MAX_HEALTH_S = 1.0
LEAVES = 0  # the client does not wait for its answer
JSON = {"content-type": "application/json"}


def resident(pid: int) -> int:
    """Bytes of memory that the process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0


@dataclass
class Watch:
    """What was seen of the server while something was done to it."""

    slowest: float = 0.0
    growth: dict[int, int] = field(default_factory=dict)


@contextmanager
def watched(server: RunningServer) -> Iterator[Watch]:
    """Polls /health and the memory of both processes, and checks them at the end."""
    pids = (server.process.pid, server.scheduler_pid)
    before = {pid: resident(pid) for pid in pids}
    watch, done = Watch(growth=dict.fromkeys(pids, 0)), threading.Event()

    def poll() -> None:
        with server.client() as client:
            client.get("/health")  # the connection stands before anything is measured
            while not done.wait(0.03):
                start = time.monotonic()
                assert client.get("/health").status_code == 200
                watch.slowest = max(watch.slowest, time.monotonic() - start)
                for pid in pids:
                    watch.growth[pid] = max(watch.growth[pid], resident(pid) - before[pid])

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()
    assert watch.slowest < MAX_HEALTH_S, f"/health took {watch.slowest:.2f} s"
    assert max(watch.growth.values()) < MAX_GROWTH, watch.growth


@dataclass(frozen=True)
class Row:
    name: str
    path: str
    body: Callable[[], Any]  # JSON, or bytes as they are sent
    status: int
    said: str = ""  # stands in the answer
    max_bytes: int = 8 << 20  # of the answer
    patience: float = 120.0  # seconds until the client leaves

    def content(self) -> bytes:
        body = self.body()
        return body if isinstance(body, bytes) else json.dumps(body).encode()


def params(**sampling: Any) -> dict[str, Any]:
    return {"text": "hi", "sampling_params": {"max_new_tokens": 2} | sampling}


LOGPROBS = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 20}

ROWS = [
    Row("temperature 1e39", GENERATE, lambda: params(temperature=1e39), 400, "sampling_params.temperature"),
    Row("temperature 3.5e38", CHAT, lambda: chat(temperature=3.5e38), 400, "temperature"),
    Row(
        "30 MB of text", GENERATE, lambda: {"text": "word " * 6_000_000}, 400, "text has 30000000 characters"
    ),
    Row("text over the length", COMPLETIONS, lambda: {"prompt": "x " * 100_000}, 400, "prompt"),
    Row("long chat", CHAT, lambda: chat(content="word " * 1_000_000), 400, "characters, which are more than"),
    Row(
        "120,000 stop tokens",
        GENERATE,
        lambda: {"text": ["a"] * 16, "sampling_params": {"n": 64, "stop_token_ids": [7] * 120_000}},
        400,
        "stop_token_ids",
    ),
    Row(
        "many sequences with many stop tokens",
        GENERATE,
        lambda: {
            "text": ["a"] * 16,
            "sampling_params": {"n": 64, "stop_token_ids": [*range(300)] * 3, "max_new_tokens": 1},
        },
        200,
    ),
    Row(
        "2,048 sequences", GENERATE, lambda: {"text": ["a"] * 16, "sampling_params": {"n": 128}}, 400, "2048"
    ),
    Row(
        "prompt logprobs, streamed, with text",
        GENERATE,
        lambda: (
            {
                "input_ids": [i % 250 for i in range(1900)],
                "sampling_params": {"max_new_tokens": 40, "ignore_eos": True},
                "stream": True,
                "return_text_in_logprobs": True,
            }
            | LOGPROBS
        ),
        200,
        "[DONE]",
    ),
    Row(
        "prompt logprobs of many choices",
        GENERATE,
        lambda: {"input_ids": [5] * 1900, "sampling_params": {"n": 128}} | LOGPROBS,
        400,
        "logprobs",
    ),
    Row(
        "logprobs of many choices",
        GENERATE,
        lambda: params(n=128, max_new_tokens=1900) | {"return_logprob": True, "top_logprobs_num": 20},
        400,
        "sampling_params.n, sampling_params.max_new_tokens and top_logprobs_num",
    ),
    Row(
        "logprobs of many choices without a limit",
        CHAT,
        lambda: chat(n=128, max_tokens=None, logprobs=True, top_logprobs=20),
        400,
        "n, max_tokens and top_logprobs",
    ),
    Row(
        "prompt logprobs of many choices, echoed",
        COMPLETIONS,
        lambda: {"prompt": [5] * 1900, "n": 128, "max_tokens": 1, "logprobs": 20, "echo": True},
        400,
        "echo and logprobs",
    ),
    Row(
        "512 prompts of 1,900 characters",
        GENERATE,
        lambda: {"text": [f"{i} " * 400 for i in range(512)], "sampling_params": {"max_new_tokens": 1}},
        LEAVES,
        patience=3.0,
    ),
    Row("13 texts to tokenize", TOKENIZE, lambda: {"prompt": ["x = y " * 80_000] * 13}, 400, "prompt"),
    Row("a long chat to tokenize", TOKENIZE, lambda: {"messages": long_messages()}, 400, "messages"),
    Row(
        "a query of 1 MB before each of 1,000 items",
        "/v1/score",
        lambda: {"query": "x" * (1 << 20), "items": ["y"] * 1000, "label_token_ids": [1]},
        400,
        "together",
    ),
    Row(
        "200,000 tokens before each of 500 items",
        "/v1/score",
        lambda: {"query": [5] * 200_000, "items": [[6]] * 500, "label_token_ids": [1]},
        400,
        "together",
    ),
    Row("a million numbers", GENERATE, lambda: {"input_ids": [7] * 1_000_000}, 413, "values"),
    Row("a million strings", COMPLETIONS, lambda: {"prompt": [""] * 1_000_000}, 413, "values"),
    Row("lists that are no prompts", COMPLETIONS, lambda: {"prompt": [{}] * 200_000}, 400, "prompt"),
    Row("messages that are none", CHAT, lambda: {"messages": [7] * 200_000}, 400, "messages"),
    Row("200,000 unknown members", CHAT, lambda: {f"k{i}": 1 for i in range(200_000)}, 400, "k0"),
    Row("20,000 messages", CHAT, lambda: {"messages": [MESSAGE] * 20_000}, 400, "messages"),
    Row("10 MB of escapes", GENERATE, lambda: {"text": "\n\u00e9" * 1_000_000}, 413, "escaped"),
    Row("a name of 1 MB", CHAT, lambda: {"n" * (1 << 20): 1}, 400, "nnn", max_bytes=2000),
    Row("a model of 1 MB", CHAT, lambda: chat(model="m" * (1 << 20)), 400, "model", max_bytes=2000),
    Row("a rid of 1 MB", GENERATE, lambda: params() | {"rid": "r" * (1 << 20)}, 400, "rid", max_bytes=2000),
    Row("a value of 1 MB", GENERATE, lambda: params(temperature="t" * (1 << 20)), 400, "temperature", 2000),
    Row("a body over the limit", GENERATE, lambda: b" " * (33 << 20), 413, "bytes"),
    Row("deep lists", GENERATE, lambda: b'{"text": ' + b"[" * 100_000, 400, "JSON"),
]

MESSAGE = {"role": "user", "content": "hi"}


def long_messages() -> list[dict[str, str]]:
    return [MESSAGE | {"content": "x = y " * 1200}] * 1000


def chat(content: str = "hi", **members: Any) -> dict[str, Any]:
    return {"messages": [MESSAGE | {"content": content}], "max_tokens": 2} | members


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(server: RunningServer, row: Row) -> None:
    content = row.content()
    with watched(server), server.client(timeout=row.patience) as client:
        try:
            response = client.post(row.path, content=content, headers=JSON)
        except httpx.ReadTimeout:
            assert row.status == LEAVES
            server.wait_state(num_running_reqs=0, num_waiting_reqs=0, leak=None)
            return
    assert response.status_code == row.status, response.text[:500]
    assert row.said in response.text and len(response.content) < row.max_bytes
    if row.status != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_prompt_logprobs_are_sent_once(client: httpx.Client) -> None:
    """Bug: every event of a stream repeated them: 165 MB for 4,000 tokens."""
    ids = [i % 250 for i in range(200)]
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 9, "ignore_eos": True}} | LOGPROBS
    whole = client.post(GENERATE, json=body).json()["meta_info"]
    lines = client.post(GENERATE, json=body | {"stream": True}).text.split("\n\n")
    metas = [
        json.loads(line.removeprefix("data: "))["meta_info"] for line in lines if line.startswith("data: {")
    ]
    for name in ("input_token_logprobs", "input_top_logprobs"):
        assert [name in meta for meta in metas] == [True] + [False] * (len(metas) - 1)
        assert len(metas[0][name]) == len(whole[name]) == len(ids)
    assert [len(meta["output_token_logprobs"]) for meta in metas] == [m["completion_tokens"] for m in metas]


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_only_json_is_taken(client: httpx.Client, kind: str | None) -> None:
    """Bug: any web page could drive a local server with a simple request."""
    headers = {} if kind is None else {"content-type": kind}
    for path in (GENERATE, COMPLETIONS, CHAT, "/abort_request"):
        response = client.post(path, content=b'{"text": "hi"}', headers=headers)
        assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        response = client.post(GENERATE, content=json.dumps(params()), headers={"content-type": kind})
        assert response.status_code == 200


def test_no_redirect_to_a_foreign_host(client: httpx.Client) -> None:
    headers = JSON | {"host": "evil.example"}
    response = client.post(GENERATE + "/", content=b"{}", headers=headers, follow_redirects=False)
    assert response.status_code == 404 and "location" not in response.headers


def test_cors_as_in_sglang(client: httpx.Client) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    response = client.options(GENERATE, headers={"origin": "http://page.example"} | asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] in ("*", "http://page.example")


FORGED = "x\r\n[12:00:00 http] ERROR forged \x1b[31m\u202e"


@pytest.mark.parametrize(
    "body",
    [
        {FORGED: 1},
        {"model": FORGED + ":"},
        {"temperature": FORGED},
        {"max_tokens": {FORGED: 2}},
        {"rid": FORGED},
        {"rid": FORGED * 100},
    ],
    ids=["name", "model", "value", "member", "rid", "long rid"],
)
def test_control_characters_are_escaped(server: RunningServer, body: dict[str, Any]) -> None:
    """Bug: names and values went into answers and log lines as they were."""
    with server.client() as client:
        answer = client.post(CHAT, json=chat() | body).json()
    if "error" in answer:
        assert answer["error"]["message"].isprintable() and (answer["error"]["param"] or "").isprintable()
    assert (
        "\x1b" not in server.log.read_text()
        and "\n[12:00:00 http] ERROR forged" not in server.log.read_text()
    )


def test_null_and_wide_seeds_are_taken(client: httpx.Client) -> None:
    for seed in (-1, 2**63, 2**64 - 1):
        body = params(seed=seed) | {"stream": None, "rid": None}
        assert client.post(GENERATE, json=body).status_code == 200


def test_errors_name_the_users_field(client: httpx.Client) -> None:
    """Bugs: paths held names of classes; what was wrong in `sampling_params` "should be an array"."""
    for name, value in (("n", 0), ("stop_token_ids", ["x"]), ("top_p", 7), ("nonsense", 1), ("n", "x")):
        error = client.post(GENERATE, json=params(**{name: value})).json()["error"]
        assert error["param"].startswith(f"sampling_params.{name}"), error
        assert "Generate" not in error["message"] and "array" not in error["message"], error
