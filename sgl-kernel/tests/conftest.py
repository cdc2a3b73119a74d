"""`device`: every test that takes it runs on the CPU, and on CUDA where there is one (marked gpu)."""

from __future__ import annotations

import pytest
import sgl_kernel
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return require_device(request.param)


@pytest.fixture
def cuda() -> str:
    return require_device("cuda")


def require_device(device_type: str) -> str:
    """Skips where there is no such device; fails where there is one and its library does not load."""
    if device_type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    error = sgl_kernel.load_error(device_type)
    assert error is None, error
    return device_type
