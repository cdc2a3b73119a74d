"""The CUDA kernels themselves, run thread by thread on the CPU: the same cases, without a GPU.

`build/emulation/` holds a library in which the kernels stand where the CPU implementation stands otherwise.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from forked import ForkedProcess, run_script

TESTS = Path(__file__).resolve().parent
LIBRARIES = TESTS.parent / "build" / "emulation"
CASES = [
    "test_decode_inputs.py",
    "test_fused_metadata_copy.py",
    "test_nsa_metadata_generate.py",
    "test_paged_mqa_schedule.py",
    "test_replay_copy.py",
    "test_replays.py",
    "test_sglang_calls.py",
    "test_topk_slots.py",
]
ENVIRONMENT = os.environ | {"SGL_KERNEL_LIBRARY_DIR": str(LIBRARIES)}

pytestmark = pytest.mark.skipif(not LIBRARIES.is_dir(), reason=f"{LIBRARIES.name} was not built")


def run_tests(*arguments: str) -> None:
    sys.exit(pytest.main(list(arguments)))


def test_cases(tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ["-q", "-m", "not gpu", *(str(TESTS / name) for name in CASES)]
    process = ForkedProcess(run_tests, *arguments, env=ENVIRONMENT, log=log)
    assert process.wait(500) == 0, log.read_text()[-4000:]


def test_random_cases(tmp_path: Path) -> None:
    arguments = ["--seconds", "60", "--cases", "1000"]
    status, output = run_script(TESTS / "fuzz_metadata.py", *arguments, env=ENVIRONMENT, log=tmp_path / "log")
    assert status == 0, output[-4000:]
