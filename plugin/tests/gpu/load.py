"""Requests to a running SGLang, over its own /generate; nothing but the standard library."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def post(port: int, path: str, body: dict[str, Any], timeout: float = 240) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text = answer.read()
    return json.loads(text) if text[:1] in (b"{", b"[") else None


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(10, 30000) for _ in range(length)]


def generate(port: int, ids: list[int] | list[list[int]], tokens: int, rid: str | None = None) -> Any:
    """An answer; to a list of prompts, a list of them."""
    parameters = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": ids, "sampling_params": parameters}
    return post(port, "/generate", body | ({"rid": rid} if rid else {}))


LENGTHS = (3, 60, 64, 65, 300, 600, 1999, 2500, 5000)


class Background:
    """Calls a function in a thread that nobody has to wait for."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._result: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(function, *arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            self._result.append(function(*arguments))
        except Exception as error:
            print(f"{function.__name__}: {error!r}", flush=True)

    def join(self) -> None:
        self._thread.join()

    def wait(self, seconds: float) -> Any | None:
        """The result, or None if it takes longer or fails: no report is lost with a server that hangs."""
        self._thread.join(max(0, seconds))
        return self._result[0] if self._result else None


def prompts() -> list[list[int]]:
    """33 fixed ones, of 3 to 5,000 tokens."""
    return [prompt(i, n) for i, n in enumerate(LENGTHS)] + [prompt(100 + i, 40 * i + 7) for i in range(24)]


def greedy(port: int, tokens: int = 96) -> list[dict[str, Any]]:
    """Answers to fixed prompts: some one at a time, then the others eight at once as they come."""
    sent = prompts()
    answers = [_answer("alone", generate(port, ids, tokens)) for ids in sent[: len(LENGTHS)]]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(generate, port, ids, tokens) for ids in sent[len(LENGTHS) :]]
        return answers + [_answer("eight at a time", future.result()) for future in futures]


BATCHES = (1, 4, 8)


def batched(port: int, tokens: int = 96) -> list[dict[str, Any]]:
    """Every prompt in batches of each size, a batch after the other. Where the server lets a batch wait until
    it is complete (`COLOCATED`), what is computed together does not depend on the clock."""
    answers, sent = [], prompts()
    for size in BATCHES:
        for start in range(0, len(sent), size):
            found = generate(port, sent[start : start + size], tokens)
            answers += [_answer(f"in batches of {size}", answer) for answer in found]
    return answers


COLOCATED = {"SGLANG_ENABLE_COLOCATED_BATCH_GEN": "1"}


def _answer(sent: str, answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "sent": sent,
        "tokens": answer.get("output_ids") or answer["text"],
        "verified": answer["meta_info"].get("spec_verify_ct"),
    }


def steady(port: int, requests: int, seconds: float, length: int = 600, tokens: int = 400) -> float:
    """Keeps `requests` running for so long; returns the median time per output token in milliseconds."""
    per_token: list[float] = []
    until = time.monotonic() + seconds

    def stream(index: int) -> None:
        turn = 0
        while time.monotonic() < until:
            started = time.monotonic()
            answer = generate(port, prompt(1000 * index + turn, length), tokens)
            per_token.append((time.monotonic() - started) / answer["meta_info"]["completion_tokens"] * 1e3)
            turn += 1

    for running in [Background(stream, index) for index in range(requests)]:
        running.join()
    if not per_token:
        raise RuntimeError("no answer")
    return statistics.median(per_token)


class Mixed:
    """Requests of all lengths that come, go and are aborted, from several clients at once, for `seconds`."""

    def __init__(self, port: int, seconds: float, clients: int = 10) -> None:
        self.port = port
        self.counts = {"finished": 0, "aborted": 0, "failed": 0, "tokens": 0, "longest prompt": 0}
        self.failures: list[str] = []
        self._until = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def join(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0, until - time.monotonic()))

    def _client(self, index: int) -> None:
        rng = random.Random(index)
        longest = 15000 if index == 0 else 5000  # all together fit into the pool of 65536
        for turn in itertools.count():
            if time.monotonic() > self._until:
                return
            length = rng.choice([1, 5, 63, 64, 65, rng.randint(1, 800), rng.randint(1, longest)])
            self._request(rng, f"mixed-{index}-{turn}", length)
            time.sleep(rng.choice([0, 0, 0.05, 0.5]))

    def _request(self, rng: random.Random, rid: str, length: int) -> None:
        abort = rng.random() < 0.25
        if abort:
            body = {"rid": rid}
            threading.Timer(rng.uniform(0.02, 0.8), _quietly, (self.port, "/abort_request", body)).start()
        try:
            ids = prompt(rng.randint(0, 10**6), length)
            info = generate(self.port, ids, rng.randint(1, 250), rid)["meta_info"]
            outcome = "aborted" if "abort" in str(info.get("finish_reason")) else "finished"
            tokens = info.get("completion_tokens", 0)
        except Exception as error:  # SGLang answers an abort before the prefill with an error status
            outcome, tokens = ("aborted" if abort else "failed"), 0
            if not abort:
                self.failures.append(f"{rid}: {error!r}")
        with self._lock:
            self.counts[outcome] += 1
            self.counts["tokens"] += tokens
            self.counts["longest prompt"] = max(self.counts["longest prompt"], length)


def _quietly(port: int, path: str, body: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):
        post(port, path, body, 20)
