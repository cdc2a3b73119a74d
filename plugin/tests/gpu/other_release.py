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
IMPORTED = ("sglang.srt.plugins.hook_registry", "sglang.srt.layers.attention.dsa_backend")
FLASH_ATTENTION = "sglang.srt.layers.attention.flashattention_backend"


def import_module(name: str) -> None:
    stood_in = stand_ins.import_with_stand_ins(name)
    print(f"{name} imports; stood in for: {', '.join(stood_in) or 'nothing'}", flush=True)


def main() -> int:
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    for name in IMPORTED:
        import_module(name)
    files = ["test_metadata.py", "test_verification.py"]
    try:
        import_module(FLASH_ATTENTION)
        files.append("test_fa3.py")
    except Exception as error:
        print(f"{FLASH_ATTENTION} does not import here: {error!r}", flush=True)
    options = ["-q", "-c", os.devnull, "--rootdir", str(TESTS), "-p", "no:cacheprovider", "-W", "ignore"]
    paths = [str(TESTS / name) for name in files]
    return pytest.main([*paths, *options, "-k", COMPARISONS, "--tb", "short", "--maxfail", "4"])


if __name__ == "__main__":
    sys.exit(main())
