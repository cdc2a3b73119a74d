"""The order of the test files: those that take long first, so that two processes end at the same time."""

from __future__ import annotations

import gc

import pytest

gc.disable()  # until all is imported, which stays

LONG = (
    "test_engine_invariance.py",
    "test_load.py",
    "test_http_process.py",
    "test_jit.py",
    "test_train_tiny_nsa.py",
    "test_emulated_kernels.py",
    "test_compare_paths.py",
    "test_compare_servers.py",
    "test_speculation.py",
    "test_engine_calls.py",
    "test_penalties.py",
    "test_study.py",
    "test_http_generate.py",
    "test_event_loop.py",
    "test_hostile.py",
    "test_nsa_paths.py",
    "test_nextn_state.py",
    "test_http_identity.py",
    "test_http_malformed.py",
    "test_tiny_nsa_runtime.py",
    "test_scheduler.py",
    "test_index_scores.py",
    "test_step_trace.py",
    "test_scheduler_process.py",
    "test_bench_metadata.py",
    "test_prefill_budget.py",
    "test_nsa_replays.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    gc.enable()
