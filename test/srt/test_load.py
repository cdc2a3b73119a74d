"""Many requests at once: each answer equals the one that the same request gets alone, without a server, and
at the end every page is back."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fixture import SPECULATIVE_FLAGS, RunningServer, launch
from sglang.srt.entrypoints.engine import Engine

TEMPLATES = 12
# A cache too small for all that may run and pages that fill soon, so that requests are retracted.
TIGHT_FLAGS = ("--max-total-tokens", "416", "--page-size", "16", "--max-running-requests", "24")
TIGHT_FLAGS += ("--chunked-prefill-size", "64")


@dataclass(frozen=True)
class Template:
    """A request that is asked alone first and many times together with others later."""

    body: dict[str, Any]
    text: str
    finish_reason: dict[str, Any]


def random_body(rng: random.Random, shared: str) -> dict[str, Any]:
    """Long and short prompts, some with a common start; greedy and sampled; some with stops."""
    prompt = shared[: rng.choice([0, 0, 40, 80])] + "".join(rng.choices("abcdef \n", k=rng.randint(1, 80)))
    sampling: dict[str, Any] = {"max_new_tokens": rng.choice([1, 50, 100]), "temperature": 0}
    if rng.random() < 0.5:
        sampling |= {"temperature": 1.0, "top_p": 0.9, "seed": rng.randrange(2**63)}
    if rng.random() < 0.4:
        sampling["stop"] = rng.sample("abcdefghijklmnopqrstuvwxyz0123456789", k=3)
    sampling["ignore_eos"] = rng.random() < 0.5
    return {"text": prompt, "sampling_params": sampling}


@pytest.fixture(scope="module")
def templates(dummy_model: Path) -> list[Template]:
    rng = random.Random(5)
    shared = "".join(rng.choices("uvwxyz", k=80))
    bodies = [random_body(rng, shared) for _ in range(TEMPLATES)]
    with Engine(model_path=str(dummy_model), device="cpu", disable_radix_cache=True) as engine:
        answers = [engine.generate(body["text"], body["sampling_params"]) for body in bodies]
    templates = [
        Template(body, answer["text"], answer["meta_info"]["finish_reason"])
        for body, answer in zip(bodies, answers)
    ]
    assert {template.finish_reason["type"] for template in templates} == {"length", "stop"}
    return templates


async def whole(client: httpx.AsyncClient, template: Template, rng: random.Random) -> None:
    answer = (await client.post("/generate", json=template.body)).raise_for_status().json()
    assert answer["text"] == template.text
    assert answer["meta_info"]["finish_reason"] == template.finish_reason


async def stream(client: httpx.AsyncClient, template: Template, rng: random.Random) -> None:
    text = ""
    async with client.stream("POST", "/generate", json=template.body | {"stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert chunk["text"].startswith(text)
                text = chunk["text"]
    assert text == template.text


async def leave_stream(client: httpx.AsyncClient, template: Template, rng: random.Random) -> None:
    """Goes away after a few tokens."""
    remaining = rng.randint(0, 3)
    async with client.stream("POST", "/generate", json=template.body | {"stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                assert template.text.startswith(json.loads(line.removeprefix("data: "))["text"])
                remaining -= 1
            if remaining < 0:
                return


async def leave_whole(client: httpx.AsyncClient, template: Template, rng: random.Random) -> None:
    """Goes away without an answer: waiting, in prefill, while it runs, or just done."""
    try:
        await client.post("/generate", json=template.body, timeout=rng.choice([0.05, 0.5, 2.0]))
    except httpx.TimeoutException:
        return


async def malformed(client: httpx.AsyncClient, template: Template, rng: random.Random) -> None:
    body = template.body | rng.choice([{"text": 7}, {"nonsense": 1}, {"text": "x" * 3000}])
    assert (await client.post("/generate", json=body)).status_code == 400


KINDS = {whole: 40, stream: 30, leave_stream: 15, leave_whole: 10, malformed: 5}


async def run_load(server: RunningServer, templates: list[Template], requests: int) -> None:
    rng = random.Random(11)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        kinds = rng.choices(list(KINDS), weights=list(KINDS.values()), k=requests)
        calls = (kind(client, rng.choice(templates), random.Random(i)) for i, kind in enumerate(kinds))
        await asyncio.wait_for(asyncio.gather(*calls), 400)


@pytest.mark.parametrize(
    ("flags", "requests"), [((), 40), (SPECULATIVE_FLAGS, 50)], ids=["plain", "speculative"]
)
def test_load(
    dummy_model: Path, templates: list[Template], tmp_path: Path, flags: tuple[str, ...], requests: int
) -> None:
    env = {"SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA": str(int(bool(flags)))}
    with launch(dummy_model, tmp_path / "log", *TIGHT_FLAGS, *flags, **env) as server:
        asyncio.run(run_load(server, templates, requests))
        state = server.wait_state(num_running_reqs=0, num_waiting_reqs=0, leak=None)
        assert state["available_pages"] + state["evictable_pages"] == state["total_pages"]
        assert state["num_retractions"] > 0  # the load was more than fits
        assert state["cache_hit_rate"] > 0
        with server.client() as client:
            client.post("/flush_cache").raise_for_status()
        assert server.internal_state()["available_pages"] == state["total_pages"]
        assert "not accounted for" not in server.log.read_text()
        assert "Traceback" not in server.log.read_text()
