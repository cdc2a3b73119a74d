"""Captured once, replayed with other lengths, pool indices and contents: all are read on the device."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sgl_kernel
import torch
from arena import DECODE, DRAFT_EXTEND, TARGET_VERIFY, assert_same, fill_random
from copy_cases import CopyRig, metadata_copy_case
from generate_cases import GenerateCase, GenerateRig, generate_case

pytestmark = pytest.mark.gpu
REPLAYS = 60

GENERATE = [
    generate_case(DECODE, 8, (300,), offsets=(1, 2, 3)),
    generate_case(DECODE, 1, (5000,), offsets=(0,)),
    generate_case(TARGET_VERIFY, 8, (300,), rows_per_req=4),
    generate_case(DRAFT_EXTEND, 8, (300,), rows_per_req=4),
    generate_case(DRAFT_EXTEND, 8, (300,), rows_per_req=4, packed=True, offsets=(0, 1)),
    generate_case(DECODE, 4, (100,), offsets=tuple(range(40))),  # two launches
]


def capture(run: object) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("case", GENERATE)
def test_generate(case: GenerateCase, cuda: str) -> None:
    """Lengths below, at and above the captured ones; the first launch may be the captured one."""
    rng = random.Random(0)
    longest = max(case.seq_lens[0])
    drawn = [tuple(rng.randint(0, longest * 2) for _ in range(case.bs)) for _ in range(REPLAYS)]
    edges = [(n,) * case.bs for n in (0, 1, longest, 10 * longest)]
    rig = GenerateRig(replace(case, seq_lens=(case.seq_lens[0], *edges, *drawn)), cuda)
    graph = capture(rig.plan.run)
    for run in range(len(rig.case.seq_lens)):
        rig.set_run(run)
        rig.buffer.copy_(rig.fresh)
        graph.replay()
        assert_same(rig.arena, rig.buffer, rig.expected(), (case, run))


@pytest.mark.parametrize("expanded_rows", [0, 7, -1])
def test_copy(expanded_rows: int, cuda: str) -> None:
    case = metadata_copy_case(DRAFT_EXTEND, 4, 200, rows_per_req=3, n=3, flashmla=True)
    rig = CopyRig(case, cuda)
    graph = capture(lambda: rig.plan.run(expanded_rows, 130))
    generator = torch.Generator().manual_seed(1)
    for _ in range(REPLAYS):
        for source, _destinations in rig.slots:
            fill_random(source.view(rig.fresh), generator)
        rig.buffer.copy_(rig.fresh)
        graph.replay()
        assert_same(rig.arena, rig.buffer, rig.expected(expanded_rows, 130), case)


def test_generate_then_copy_in_one_graph(cuda: str) -> None:
    """What a replay does: generate into one set, copy it to others, on one captured stream."""
    generate = GenerateRig(generate_case(DECODE, 8, (300,)), cuda)
    copies = CopyRig(metadata_copy_case(DECODE, 8, 300), cuda)

    def both() -> None:
        generate.plan.run()
        copies.plan.run()

    graph = capture(both)
    for rig in (generate, copies):
        rig.buffer.copy_(rig.fresh)
    graph.replay()
    assert_same(generate.arena, generate.buffer, generate.expected(), generate.case)
    assert_same(copies.arena, copies.buffer, copies.expected(-1, -1), copies.case)


FIRST_CALL = """
import sgl_kernel, torch
src, dst = [], []
for shape in ((2,), (3,), (2, 40), (2,), None, (3,), None, None, None):
    src.append(None if shape is None else torch.randint(1, 99, shape, dtype=torch.int32, device="cuda"))
    dst.append(None if shape is None else torch.zeros_like(src[-1]))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    sgl_kernel.fused_metadata_copy_cuda(*src, *dst, 0, 2, 40, 0, 2)
graph.replay()
assert torch.equal(dst[2], src[2]) and torch.equal(dst[5][1:], src[5][1:])
"""


def test_the_first_call_of_a_process_may_be_captured(cuda: str) -> None:
    """SGLang's calls have no plan that would load their kernel: a call loads it, in a capture too."""
    path = os.pathsep.join(
        filter(None, (str(Path(sgl_kernel.__file__).parent.parent), os.getenv("PYTHONPATH")))
    )
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_MODULE_LOADING": "LAZY"}
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
