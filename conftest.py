"""The order of the test files: those that take long first, so that two processes end at the same time."""

from __future__ import annotations

import pytest

LONG = (
    "test_http_process.py",
    "test_load.py",
    "test_emulated_kernels.py",
    "test_engine_invariance.py",
    "test_penalties.py",
    "test_jit.py",
    "test_train_tiny_nsa.py",
    "test_properties.py",
    "test_event_loop.py",
    "test_speculation.py",
    "test_layouts_benchmark.py",
    "test_nextn_state.py",
    "test_scheduler_process.py",
    "test_engine_calls.py",
    "test_tiny_nsa_runtime.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
