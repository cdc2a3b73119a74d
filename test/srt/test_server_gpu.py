"""End to end on a GPU: the server with the shipped model says what the CPU reference says, on every path."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest
import torch
from server_fixture import ROOT, RunningServer, starting, wait_ready
from sglang.srt.entrypoints.engine import Engine

pytestmark = pytest.mark.gpu

MODEL = ROOT / "models" / "tiny-nsa"
GREEDY = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}
NUM_PROMPTS = 16

# What each server runs with: whether metadata is computed once, and flags.
STEPS = ("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "4")
CASES: dict[str, tuple[bool, tuple[str, ...]]] = {
    "plain": (False, ()),
    "recompute": (False, STEPS),
    **{
        layout: (True, (*STEPS, "--nsa-metadata-layout", layout))
        for layout in ("replicate", "shared", "in_graph", "indirect")
    },
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunningServer]]:
    """All of them start, and end, at once: a start is mostly the work of one thread."""
    shared = ("--device", "cuda", "--dtype", "float32", "--cuda-graph-max-bs", "16")
    logs = tmp_path_factory.mktemp("servers")
    with contextlib.ExitStack() as stack:
        started: dict[str, RunningServer] = {}
        for name, (precompute, flags) in CASES.items():
            env = {
                "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA": str(int(precompute)),
                "SGLANG_NSA_VERIFY_METADATA": "1",
            }
            started[name] = stack.enter_context(starting(MODEL, logs / name, *shared, *flags, **env))
        yield started
        for server in started.values():
            server.process.terminate()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (MODEL / "held_out.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    return [json.loads(line)["prompt"] for line in lines]


@pytest.fixture(scope="module")
def expected(servers: dict[str, RunningServer], prompts: list[str]) -> list[list[int]]:
    """By one thread, while the servers start: tens of them take ten times as long for so small a model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Engine(model_path=str(MODEL), device="cpu", dtype="float32") as engine:
            return [output["output_ids"] for output in engine.generate(prompts, GREEDY)]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_the_cpu_reference(
    name: str, servers: dict[str, RunningServer], prompts: list[str], expected: list[list[int]]
) -> None:
    server = servers[name]
    wait_ready(server)
    with server.client(timeout=300) as client:
        answer = client.post("/generate", json={"text": prompts, "sampling_params": GREEDY})
        outputs = answer.raise_for_status().json()
    state = server.internal_state()
    assert [output["output_ids"] for output in outputs] == expected
    assert state["leak"] is None
    assert state["nsa_metadata"]["fallbacks"] == 0
