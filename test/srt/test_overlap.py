"""Steps that overlap give the tokens of steps that do not: with stops, penalties, filters, aborts, chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.entrypoints.engine import Engine

PROMPTS = [
    torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 150, 33, 64, 9, 90)
]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "max_new_tokens": 40},
    {"temperature": 0, "max_new_tokens": 1},
    {"temperature": 0.8, "seed": 3, "max_new_tokens": 33},
    {"temperature": 0.8, "seed": 4, "top_p": 0.7, "top_k": 20, "max_new_tokens": 21},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "max_new_tokens": 37},
    {"temperature": 0, "max_new_tokens": 60, "stop_token_ids": list(range(0, 250, 9))},
]


def answers(model: Path, rounds: list[list[int]], **args: Any) -> list[list[int]]:
    """Of each round's requests, all at once; a round's batch differs from the next one's."""
    options = {"max_total_tokens": 4096, "chunked_prefill_size": 64, "dtype": "float32"}
    with Engine(model_path=str(model), **(options | args)) as engine:
        found: list[list[int]] = []
        for members in rounds:
            outputs = engine.generate(
                input_ids=[PROMPTS[i] for i in members], sampling_params=[PARAMS[i] for i in members]
            )
            found += [output["output_ids"] for output in outputs]
        assert engine.scheduler.check_memory() is None
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("speculates", [True, False], ids=["speculative", "plain"])
def test_overlap_on_the_device_changes_no_token(dummy_model: Path, speculates: bool, graph: bool) -> None:
    """Against plain decoding on the CPU, which waits for every step."""
    rounds = [[0], [2], [0, 1, 2], [3], [4], [5], [0, 2, 5], list(range(len(PROMPTS)))]
    expected = answers(dummy_model, rounds, device="cpu", disable_cuda_graph=True)
    speculation = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3} if speculates else {}
    for disabled in (False, True):
        args = {"disable_overlap_schedule": disabled, "disable_cuda_graph": not graph, **speculation}
        assert answers(dummy_model, rounds, device="cuda", **args) == expected, f"{disabled=}"


def test_a_cpu_does_not_overlap(dummy_model: Path) -> None:
    with Engine(model_path=str(dummy_model), device="cpu", max_total_tokens=1024) as engine:
        assert not engine.scheduler.worker.overlaps
