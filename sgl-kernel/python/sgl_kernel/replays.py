"""What a replay calls: plans bound into one builtin, so that a step pays for one call and nothing around it.

Each function returns a callable that takes `max_len`, a bound of the row lengths (-1: the full extent), and
keeps the plans and their tensors alive. `plan.run()` does the same and is what `torch.compile` understands.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from ._library import entry, operator
from .fused_metadata import FusedMetadataCopyPlan, NSAMetadataGeneratePlan
from .replay_copy import ReplayCopyPlan

Replay = Callable[[int], None]

_new_builtin = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.py_object)(
    ("PyCFunction_NewEx", ctypes.pythonapi)
)  # of a method's definition, its `self` and its module's name


def bind_generate(generate: NSAMetadataGeneratePlan) -> Replay:
    """A generation. It is faster with a bound of the lengths, and does not depend on it."""
    return _bind(generate, None)


def bind_copy(copy: FusedMetadataCopyPlan) -> Replay:
    """A copy. `max_len` beyond some region's extent is an error."""
    return _bind(None, copy)


def bind_generate_and_copy(generate: NSAMetadataGeneratePlan, copy: FusedMetadataCopyPlan) -> Replay:
    """A generation and the copy of what it wrote, in one call. `max_len` as for the copy."""
    return _bind(generate, copy)


def _bind(generate: NSAMetadataGeneratePlan | None, copy: FusedMetadataCopyPlan | None) -> Replay:
    """A builtin function of the library (`metadata_replay.cc`) whose `self` are the plans."""
    plans = (generate, copy)
    addresses = (0 if plan is None else plan.address for plan in plans)
    (device_type,) = {plan.device_type for plan in plans if plan is not None}
    return _new_builtin(operator(device_type, "metadata_replay_method")(), (*addresses, *plans), __name__)


def bind_replay_copy(copy: ReplayCopyPlan) -> Callable[[Sequence[torch.Tensor], int, int], None]:
    """A copy of tensors that are new at every step. What is returned takes the arguments of
    `ReplayCopyPlan.run`, with the sources in a list."""
    run, plan = entry(copy.device_type, copy.run_name), copy._plan

    def replay(sources: Sequence[torch.Tensor], batch_size: int, width: int, _alive: object = copy) -> None:
        run(plan, batch_size, width, *sources)

    return replay
