"""The compact list of cases that sanitize.sh runs under compute-sanitizer: every kernel path, small sizes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "python")]

import sgl_kernel  # noqa: E402
import test_decode_inputs as decode_tests  # noqa: E402
import test_fused_metadata_copy as copy_tests  # noqa: E402
import test_index_scores as scores_tests  # noqa: E402
import test_nsa_metadata_generate as generate_tests  # noqa: E402
import test_paged_mqa_schedule as schedule_tests  # noqa: E402
import test_replay_copy as replay_tests  # noqa: E402
import test_sglang_calls as sglang_tests  # noqa: E402
import test_topk_slots as topk_tests  # noqa: E402
import torch  # noqa: E402
from arena import assert_same  # noqa: E402
from copy_cases import CopyCase, CopyRig  # noqa: E402
from generate_cases import GenerateRig, generate_case  # noqa: E402
from replay_cases import ReplayRig  # noqa: E402
from sgl_kernel import PagedMQASplit  # noqa: E402

# All destinations of a step in one launch, and those of readers that need the vectors alone.
DESTINATIONS = [
    *[
        generate_case(m, 5, (1, 300, 64), offsets=range(7), rows_per_req=r)
        for m, r in ((0, 1), (1, 3), (2, 3))
    ],
    *[
        replace(case, dsts=tuple(replace(d, width1=None, width2=None) for d in case.dsts))
        for case in (
            generate_case(m, 33, (1, 300), offsets=(0, 1), rows_per_req=r) for m, r in ((0, 1), (2, 3))
        )
    ],
]


def main() -> None:
    error = sgl_kernel.load_error("cuda")
    if error is not None:
        sys.exit(error)
    for case in copy_tests.CORRECTNESS[:12] + copy_tests.CORNER:
        CopyRig(case, "cuda").check()
    for spec in copy_tests.ELEMENTS:
        CopyRig(CopyCase((spec,)), "cuda").check()
    for case in generate_tests.CORRECTNESS[:20] + generate_tests.CORNER + generate_tests.WHOLE_TILES[:8]:
        for whole_pages in (False, True):
            GenerateRig(replace(case, whole_pages=whole_pages), "cuda").check()
    for case in sglang_tests.SINGLE + sglang_tests.MULTI[:4]:
        rig = sglang_tests.SGLangRig(case, "cuda")
        rig.call(rig.buffer)
        assert_same(rig.arena, rig.buffer, rig.expected(), case)
    for case in decode_tests.CASES:
        decode_tests.Rig(case, "cuda").check()
    for case in replay_tests.CASES:
        ReplayRig(case, "cuda").check()
    for case in DESTINATIONS:
        GenerateRig(case, "cuda").check()
    for lens, next_n, num_sms in schedule_tests.CORNERS:
        rows = torch.tensor([[n] * next_n for n in lens], dtype=torch.int32).view(len(lens), next_n)
        found = schedule_tests.run(rows.cuda(), num_sms, PagedMQASplit())
        assert found == schedule_tests.reference(rows.tolist(), num_sms, PagedMQASplit())
    for topk_case in topk_tests.CASES + topk_tests.LONG_CASES:
        topk_tests.Rig(topk_case, "cuda").check()
    if sgl_kernel.serves_index_scores(torch.device("cuda"), torch.bfloat16, 64, 128):
        for scores_case in scores_tests.CASES:
            scores_tests.Rig(scores_case, "cuda").check()
    torch.cuda.synchronize()
    print("all cases passed")


if __name__ == "__main__":
    main()
