"""The tests' comparisons on a GPU, beside classes of a release whose own torch and kernels are not there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PLUGIN_TEST_DEVICE"] = "cuda"

import pytest
import stand_ins
import torch

TESTS = Path(__file__).resolve().parents[1]
COMPARISONS = "test_equals_sglang or test_no_difference or test_a_difference_is_named"
IMPORTED = (
    "sglang.srt.plugins.hook_registry",
    "sglang.srt.layers.attention.dsa_backend",
    "sglang.srt.layers.attention.flashattention_backend",
)


def main() -> int:
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    for name in IMPORTED:
        stood_in = stand_ins.import_with_stand_ins(name)
        print(f"{name} imports; stood in for: {', '.join(stood_in) or 'nothing'}", flush=True)
    files = [str(TESTS / name) for name in ("test_metadata.py", "test_verification.py", "test_fa3.py")]
    options = ["-q", "-c", os.devnull, "--rootdir", str(TESTS), "-p", "no:cacheprovider", "-W", "ignore"]
    return pytest.main([*files, *options, "-k", COMPARISONS, "--tb", "short", "--maxfail", "4"])


if __name__ == "__main__":
    sys.exit(main())
