"""Requests to a running SGLang, over its own /generate; nothing but the standard library."""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def post(port: int, path: str, body: dict[str, Any], timeout: float = 240) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(10, 30000) for _ in range(length)]


def generate(port: int, ids: list[int], tokens: int, rid: str | None = None) -> dict[str, Any]:
    parameters = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": ids, "sampling_params": parameters}
    return post(port, "/generate", body | ({"rid": rid} if rid else {}))


LENGTHS = (3, 60, 64, 65, 300, 600, 1999, 2500, 5000)
ALONE = len(LENGTHS)  # answers that are asked for one at a time


def greedy(port: int, tokens: int = 96) -> list[dict[str, Any]]:
    """Answers to fixed prompts, sent one at a time and then eight at once, in the order of the prompts."""
    answers = [generate(port, prompt(i, n), tokens) for i, n in enumerate(LENGTHS)]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(generate, port, prompt(100 + i, 40 * i + 7), tokens) for i in range(24)]
        answers += [future.result() for future in futures]
    return [
        {
            "tokens": answer.get("output_ids") or answer["text"],
            "verified": answer["meta_info"].get("spec_verify_ct"),
        }
        for answer in answers
    ]


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

    threads = [threading.Thread(target=stream, args=(i,), daemon=True) for i in range(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.median(per_token)


def mixed(port: int, seconds: float, clients: int = 10, longest: int = 6000) -> dict[str, int]:
    """Requests of all lengths that come, go and are aborted, from several clients at once."""
    counts = {"finished": 0, "aborted": 0, "failed": 0, "tokens": 0}
    lock = threading.Lock()
    until = time.monotonic() + seconds

    def client(index: int) -> None:
        rng = random.Random(index)
        turn = 0
        while time.monotonic() < until:
            turn += 1
            length = rng.choice([1, 5, 63, 64, 65, rng.randint(1, 800), rng.randint(1, longest)])
            rid = f"mixed-{index}-{turn}"
            abort = rng.random() < 0.25
            if abort:
                delay = rng.uniform(0.02, 0.8)
                threading.Timer(delay, lambda rid=rid: _quietly(port, "/abort_request", {"rid": rid})).start()
            try:
                answer = generate(port, prompt(rng.randint(0, 10**6), length), rng.randint(1, 250), rid)
                outcome = (
                    "aborted" if "abort" in str(answer["meta_info"].get("finish_reason")) else "finished"
                )
                tokens = answer["meta_info"].get("completion_tokens", 0)
            except Exception:
                outcome, tokens = ("aborted" if abort else "failed"), 0
            with lock:
                counts[outcome] += 1
                counts["tokens"] += tokens
            time.sleep(rng.choice([0, 0, 0.05, 0.5]))

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def _quietly(port: int, path: str, body: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):
        post(port, path, body, 20)
