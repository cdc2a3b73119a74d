"""A headless Chromium of the system's, and real servers of the small model for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from page_driver import KEY, MODEL
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from server_fixture import RunningServer, launch

FLAGS = (
    "--served-model-name",
    "tiny-nsa",
    "--speculative-algorithm",
    "NEXTN",
    "--speculative-num-steps",
    "4",
)
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",  # containers run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshot", type=Path, help="where to write the README's picture of the page")


def browser_paths() -> tuple[str | None, str | None]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return chromium, shutil.which("chromedriver")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One browser, in which each test opens the page anew; it talks to no other host."""
    chromium, driver = browser_paths()
    if chromium is None or driver is None:
        missing = "chromium" if chromium is None else "chromedriver"
        pytest.skip(f"{missing} is not installed (Debian: apt-get install chromium chromium-driver)")
    options = Options()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    with webdriver.Chrome(options, Service(driver)) as chrome:
        yield chrome


@contextmanager
def serve(log: Path, *flags: str) -> Iterator[RunningServer]:
    with launch(MODEL, log, *FLAGS, *flags, SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA="1") as running:
        yield running


@pytest.fixture(scope="session")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Without a key; left as it was."""
    with serve(tmp_path_factory.mktemp("open") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """With a key. The last test that uses it kills it."""
    with serve(tmp_path_factory.mktemp("guarded") / "log", "--api-key", KEY) as running:
        yield running
