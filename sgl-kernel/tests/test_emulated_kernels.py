"""The CUDA kernels themselves, run thread by thread on the CPU: the same cases, without a GPU.

`build/emulation/` holds a library in which the kernels stand where the CPU implementation stands otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
]
COMMANDS = {
    "cases": ["-m", "pytest", "-q", "-m", "not gpu", *(str(TESTS / name) for name in CASES)],
    "random cases": [str(TESTS / "fuzz_metadata.py"), "--seconds", "15", "--cases", "1500"],
}


@pytest.mark.skipif(not LIBRARIES.is_dir(), reason=f"{LIBRARIES.name} was not built")
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_kernels(command: list[str]) -> None:
    environment = {**os.environ, "SGL_KERNEL_LIBRARY_DIR": str(LIBRARIES)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
