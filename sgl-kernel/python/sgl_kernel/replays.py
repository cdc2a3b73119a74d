"""What a replay calls: plans bound into one builtin, so that a step pays for one call and nothing around it.

Each function returns a callable that keeps the plans and their tensors alive and, unless it says otherwise,
takes `max_len`, a bound of the row lengths (-1: the full extent). `plan.run()` does the same and is what
`torch.compile` understands.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from ._library import operator
from .fused_metadata import FusedMetadataCopyPlan, NSAMetadataGeneratePlan
from .replay_copy import ReplayCopyPlan

Replay = Callable[[int], None]

_new_builtin = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.py_object)(
    ("PyCFunction_NewEx", ctypes.pythonapi)
)  # of a method's definition, its `self` and its module's name
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


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


def bind_replay_copy(copy: ReplayCopyPlan) -> Callable[..., None]:
    """A copy of tensors that are new at every step. What is returned takes the batch size, the width and the
    sources of `ReplayCopyPlan.run`, one by one."""
    exchange = _exchange_api()
    if exchange is None:
        return lambda batch_size, width, *sources: copy.run(sources, batch_size, width)
    return _new_builtin(
        operator(copy.device_type, "replay_copy_method")(), (copy.address, exchange, copy), __name__
    )


def _exchange_api() -> int | None:
    """The address of torch's DLPackExchangeAPI, which tells an address and a shape without Python or the
    dispatcher; None in a torch that has none of the version known here."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    address = _capsule_pointer(capsule, b"dlpack_exchange_api") if capsule is not None else 0
    return address if address and ctypes.c_uint32.from_address(address).value == 1 else None
