"""DeepGEMM's schedule of paged MQA logits, written into buffers that a graph owns: planned once, run every
step.

DeepGEMM's own `get_paged_mqa_logits_metadata` allocates its result, so every backend needs a call and a copy.
This writes the schedules of all backends in one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ._plan import Plan

SEGMENT = 256
"""Keys that an SM scores at a time: four pages of 64."""


@dataclass(frozen=True)
class PagedMQASplit:
    """How the work is counted and divided, which differs between releases of DeepGEMM.

    rows_per_atom: query rows of a request that are scored together: all of them, two (an odd one out is an
        atom, too), two if their number is even and else one, or one.
    remainder: which SMs take what does not divide evenly.
    order: a request's work is all segments of one atom after the other, or all atoms of one segment.
    """

    rows_per_atom: Literal["all", "two", "two if even", "one"] = "two"
    remainder: Literal["first", "last"] = "first"
    order: Literal["atoms", "segments"] = "atoms"

    def atoms(self, next_n: int) -> int:
        """Atoms of a request of `next_n` rows."""
        if self.rows_per_atom == "two if even":
            return next_n // 2 if next_n % 2 == 0 else next_n
        return {"all": 1, "two": (next_n + 1) // 2, "one": next_n}[self.rows_per_atom]


DEEP_GEMM_SPLITS = {
    "2025-09": PagedMQASplit(rows_per_atom="all"),
    "2026-04-17": PagedMQASplit(rows_per_atom="two if even"),
    "2026-04-24": PagedMQASplit(rows_per_atom="two"),
    "2026-06-01": PagedMQASplit(rows_per_atom="two", remainder="last"),
    "2026-06-23, sm_100": PagedMQASplit(rows_per_atom="one", order="segments"),
}
"""By the date of DeepGEMM's public source from which on it holds (of sm_90 where nothing is said)."""


@dataclass(frozen=True)
class PagedMQASchedule:
    """One schedule and the lengths that it follows, on one device.

    context_lens: [B] or [B, next_n], int32, any strides; a request's last length is that of all its rows.
    schedule: [num_sms + 1, 2], int32, contiguous: the (atom, segment) where each SM starts, and the end.
    """

    context_lens: torch.Tensor
    schedule: torch.Tensor


class PagedMQASchedulePlan(Plan):
    """Writes DeepGEMM's `get_paged_mqa_logits_metadata` of every given schedule; up to 64 are one launch.

    Equal to DeepGEMM's result bit for bit with the split of its release (`find_split` finds it). Lengths are
    read on the device at every run; one below 0 counts as 0. A run enqueues on the current stream, allocates
    nothing, and can be captured in a CUDA graph.
    """

    def __init__(
        self,
        schedules: Sequence[PagedMQASchedule],
        *,
        split: PagedMQASplit = DEEP_GEMM_SPLITS["2026-04-24"],
        segment: int = SEGMENT,
    ) -> None:
        if not schedules:
            raise RuntimeError("paged_mqa_schedule: schedules: expected at least one, found 0")
        lens = [s.context_lens for s in schedules]
        super().__init__(
            lens[0].device.type,
            "paged_mqa_schedule",
            lens,
            [s.schedule for s in schedules],
            [split.atoms(l.shape[1]) if l.dim() == 2 else 1 for l in lens],
            segment,
            split.remainder == "last",
            split.order == "segments",
        )

    def run(self) -> None:
        """Writes the schedules, on the current stream."""
        self._enqueue()


def find_split(
    reference: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch: int,
    next_n: int,
    num_sms: int,
    device: torch.device | str,
) -> PagedMQASplit | None:
    """The split with which a plan equals `reference` (DeepGEMM's installed function, given context_lens
    [batch, next_n], int32) on probe lengths, or None if none does. Reads the device: for start-up."""
    lens = torch.empty((batch, next_n), dtype=torch.int32, device=device)
    schedule = torch.empty((num_sms + 1, 2), dtype=torch.int32, device=device)
    plans = [
        (split, PagedMQASchedulePlan([PagedMQASchedule(lens, schedule)], split=split))
        for split in dict.fromkeys(DEEP_GEMM_SPLITS.values())
    ]
    for probe in _probe_lengths(batch):  # [batch]
        lens.copy_(probe[:, None])
        expected = reference(lens).cpu()
        plans = [(split, plan) for split, plan in plans if _equals(plan, schedule, expected)]
    return plans[0][0] if plans else None


def _equals(plan: PagedMQASchedulePlan, schedule: torch.Tensor, expected: torch.Tensor) -> bool:
    plan.run()
    return torch.equal(schedule.cpu(), expected.view(torch.int32))


def _probe_lengths(batch: int) -> list[torch.Tensor]:
    """Lengths, [batch], int32, on which every two splits that can differ do differ."""
    request = torch.arange(batch, dtype=torch.int32)
    uneven = (request * 7919 + 1009) % 20_000 + 1
    return [torch.ones_like(request), uneven, uneven * (request % 3 > 0), torch.full_like(request, 32_768)]
