"""The compact list of cases that sanitize.sh runs under compute-sanitizer: every kernel path, small sizes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "python")]

import sgl_kernel  # noqa: E402
import test_fused_metadata_copy as copy_tests  # noqa: E402
import test_nsa_metadata_generate as generate_tests  # noqa: E402
import test_sglang_calls as sglang_tests  # noqa: E402
import torch  # noqa: E402
from arena import assert_same  # noqa: E402
from copy_cases import CopyCase, CopyRig  # noqa: E402
from generate_cases import GenerateRig  # noqa: E402


def main() -> None:
    error = sgl_kernel.load_error("cuda")
    if error is not None:
        sys.exit(error)
    for case in copy_tests.CORRECTNESS[:12] + copy_tests.CORNER:
        CopyRig(case, "cuda").check()
    for spec in copy_tests.ELEMENTS:
        CopyRig(CopyCase((spec,)), "cuda").check()
    for case in generate_tests.CORRECTNESS[:20] + generate_tests.CORNER:
        GenerateRig(case, "cuda").check()
    for case in sglang_tests.SINGLE + sglang_tests.MULTI[:4]:
        rig = sglang_tests.SGLangRig(case, "cuda")
        rig.call(rig.buffer)
        assert_same(rig.arena, rig.buffer, rig.expected(), case)
    torch.cuda.synchronize()
    print("all cases passed")


if __name__ == "__main__":
    main()
