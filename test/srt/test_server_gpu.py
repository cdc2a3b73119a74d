"""End to end on a GPU: the server with the shipped model says what the CPU reference says, on every path."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from server_fixture import ROOT, launch
from sglang.srt.entrypoints.engine import Engine

pytestmark = pytest.mark.gpu

MODEL = ROOT / "models" / "tiny-nsa"
GREEDY = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}
NUM_PROMPTS = 16


@dataclass(frozen=True)
class Case:
    name: str
    precompute: int
    flags: tuple[str, ...] = ()


CASES = [
    Case("plain", 0),
    Case("recompute", 0, ("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "4")),
    *(
        Case(
            layout,
            1,
            (
                "--speculative-algorithm",
                "NEXTN",
                "--speculative-num-steps",
                "4",
                "--nsa-metadata-layout",
                layout,
            ),
        )
        for layout in ("replicate", "shared", "in_graph", "indirect")
    ),
]


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (MODEL / "held_out.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    return [json.loads(line)["prompt"] for line in lines]


@pytest.fixture(scope="module")
def expected(prompts: list[str]) -> list[list[int]]:
    with Engine(model_path=str(MODEL), device="cpu", dtype="float32") as engine:
        return [output["output_ids"] for output in engine.generate(prompts, GREEDY)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_equal_the_cpu_reference(
    case: Case, prompts: list[str], expected: list[list[int]], tmp_path: Path
) -> None:
    flags = ("--device", "cuda", "--dtype", "float32", "--cuda-graph-max-bs", "16", *case.flags)
    env = {
        "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA": str(case.precompute),
        "SGLANG_NSA_VERIFY_METADATA": "1",
    }
    with launch(MODEL, tmp_path / "server.log", *flags, **env) as server, server.client() as client:
        answer = client.post("/generate", json={"text": prompts, "sampling_params": GREEDY}, timeout=300)
        outputs = answer.raise_for_status().json()
        state = server.internal_state()
    assert [output["output_ids"] for output in outputs] == expected
    assert state["leak"] is None
    assert state["nsa_metadata"]["fallbacks"] == 0
