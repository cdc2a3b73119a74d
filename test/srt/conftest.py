"""Fixtures shared by the tests that talk HTTP."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_fixture import COMPUTED_ONCE, ROOT, SPECULATIVE_FLAGS, RunningServer, launch


@pytest.fixture(scope="session")
def dummy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and a byte tokenizer; context 2048."""
    spec = importlib.util.spec_from_file_location(
        "make_dummy_model", ROOT / "scripts" / "make_dummy_model.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_dummy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def server(dummy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests that leave it as it was: speculation on, metadata computed once."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with launch(dummy_model, log, *SPECULATIVE_FLAGS, **COMPUTED_ONCE) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
