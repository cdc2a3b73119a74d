"""Steps that overlap give the tokens of steps that do not: with stops, penalties, filters, aborts, chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.environ import envs

PROMPTS = [
    torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 150, 33, 64, 9, 90)
]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "max_new_tokens": 26},
    {"temperature": 0, "max_new_tokens": 1},
    {"temperature": 0.8, "seed": 3, "max_new_tokens": 22},
    {"temperature": 0.8, "seed": 4, "top_p": 0.7, "top_k": 20, "max_new_tokens": 15},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "max_new_tokens": 24},
    {"temperature": 0, "max_new_tokens": 40, "stop_token_ids": list(range(0, 250, 9))},
]


def answers(model: Path, rounds: list[list[int]], overlaps: bool = False, **args: Any) -> list[list[int]]:
    """Of each round's requests, all at once; a round's batch differs from the next one's. With `overlaps`
    steps overlap where they would not."""
    options = {"max_total_tokens": 4096, "chunked_prefill_size": 64, "dtype": "float32"}
    with Engine(model_path=str(model), **(options | args)) as engine:
        engine.scheduler.worker.overlaps |= overlaps
        found: list[list[int]] = []
        for members in rounds:
            outputs = engine.generate(
                input_ids=[PROMPTS[i] for i in members], sampling_params=[PARAMS[i] for i in members]
            )
            found += [output["output_ids"] for output in outputs]
        assert engine.scheduler.check_memory() is None
    return found


ROUNDS = [[0], [3], [0, 2, 5], list(range(len(PROMPTS)))]


@pytest.fixture(scope="module")
def expected(dummy_model: Path) -> Iterator[list[list[int]]]:
    """Plain decoding on the CPU, which waits for every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 4))  # of so small products more are slower
    yield answers(dummy_model, ROUNDS, device="cpu", disable_cuda_graph=True)
    torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "args",
    [
        {"speculative_num_steps": 3},
        {"speculative_num_steps": 3, "disable_overlap_schedule": True},
        {"speculative_num_steps": 3, "disable_cuda_graph": True},
        {"speculative_num_steps": 3, "nsa_metadata_layout": "shared"},
        {"speculative_num_steps": 3, "nsa_metadata_layout": "indirect"},
        {},
    ],
    ids=["speculative", "speculative-waiting", "speculative-eager", "shared", "indirect", "plain"],
)
def test_overlap_on_the_device_changes_no_token(
    args: dict[str, Any], dummy_model: Path, expected: list[list[int]]
) -> None:
    algorithm = {"speculative_algorithm": "NEXTN"} if "speculative_num_steps" in args else {}
    with envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA.override("nsa_metadata_layout" in args):
        found = answers(dummy_model, ROUNDS, device="cuda", cuda_graph_max_bs=6, **algorithm, **args)
    assert found == expected


@pytest.mark.parametrize("steps", [None, 3], ids=["plain", "speculative"])
def test_overlap_changes_no_token(steps: int | None, dummy_model: Path, expected: list[list[int]]) -> None:
    """On the CPU, whose steps are over when they are launched: the scheduling is the same."""
    args = {"speculative_algorithm": "NEXTN", "speculative_num_steps": steps} if steps else {}
    assert answers(dummy_model, ROUNDS, True, device="cpu", cuda_graph_max_bs=6, **args) == expected


def test_a_cpu_does_not_overlap(dummy_model: Path) -> None:
    with Engine(model_path=str(dummy_model), device="cpu", max_total_tokens=1024) as engine:
        assert not engine.scheduler.worker.overlaps
