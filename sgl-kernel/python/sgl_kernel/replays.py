"""What a replay calls: an operator bound to its plan, so that a step pays for one call and nothing around it.

Each function returns a callable that takes `max_len`, a bound of the row lengths (-1: the full extent), and
keeps the plans and their tensors alive. `plan.run()` does the same and is what `torch.compile` understands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ._library import entry
from .fused_metadata import FusedMetadataCopyPlan, NSAMetadataGeneratePlan
from .replay_copy import ReplayCopyPlan

Replay = Callable[[int], None]


def bind_generate(generate: NSAMetadataGeneratePlan) -> Replay:
    """A generation. It is faster with a bound of the lengths, and does not depend on it."""
    run, plan = entry(generate.device_type, "nsa_metadata_generate_run"), generate._plan

    def replay(max_len: int, _alive: object = generate) -> None:
        run(plan, max_len)

    return replay


def bind_copy(copy: FusedMetadataCopyPlan) -> Replay:
    """A copy. `max_len` beyond some region's extent is an error."""
    run, plan = entry(copy.device_type, "fused_metadata_copy_run"), copy._plan

    def replay(max_len: int, _alive: object = copy) -> None:
        run(plan, -1, max_len)

    return replay


def bind_generate_and_copy(generate: NSAMetadataGeneratePlan, copy: FusedMetadataCopyPlan) -> Replay:
    """A generation and the copy of what it wrote, in one call. `max_len` as for the copy."""
    run = entry(generate.device_type, "nsa_metadata_replicate_run")
    generate_plan, copy_plan = generate._plan, copy._plan

    def replay(max_len: int, _alive: object = (generate, copy)) -> None:
        run(generate_plan, copy_plan, max_len)

    return replay


def bind_replay_copy(copy: ReplayCopyPlan) -> Callable[[Sequence[torch.Tensor], int, int], None]:
    """A copy of tensors that are new at every step. What is returned takes the arguments of
    `ReplayCopyPlan.run`, with the sources in a list."""
    run, plan = entry(copy.device_type, copy.run_name), copy._plan

    def replay(sources: Sequence[torch.Tensor], batch_size: int, width: int, _alive: object = copy) -> None:
        run(plan, batch_size, width, *sources)

    return replay
