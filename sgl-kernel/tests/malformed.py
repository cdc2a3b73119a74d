"""A malformed call, and the check that it is rejected with its message while nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

POISON = -77


def i32(*shape: int, device: str) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Malformed:
    name: str
    message: str  # as it stands in the error, after the operator's name
    change: Callable[..., object]


def reject(name: str, message: str, change: Callable[..., object]) -> object:
    return pytest.param(Malformed(name, message, change), id=name)


def check(case: Malformed, operator: str, call: Callable[[], object], written: list[torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"{operator}: {case.message}")):
        call()
    assert all((tensor == POISON).all() for tensor in written if tensor.device.type != "meta")
