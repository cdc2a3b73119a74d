"""The extra `gpu`: what `make setup` installs of it where an NVIDIA GPU is seen."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from server_fixture import ROOT


def setup_commands(gpus: str) -> str:
    make = ["make", "-n", "setup", f"GPU={gpus}", "VENV=/nonexistent/.venv"]
    return subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def extra() -> set[str]:
    (listed,) = re.findall(r"^gpu = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    return set(re.findall(r'"([\w-]+)', listed))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_setup_installs_the_extra_with_pinned_versions_and_our_kernels_first() -> None:
    commands = setup_commands("1")
    installed = re.findall(r"pip install .* -c constraints.txt (?:--no-deps )?([\w -]+)$", commands, re.M)
    assert extra() <= {name for line in installed for name in line.split()}
    pins = (ROOT / "constraints.txt").read_text()
    assert all(re.search(rf"^{name}==", pins, re.M) for name in extra())
    assert commands.index("./sgl-kernel") < commands.index("flashinfer-python")
    # What brings a package of the name of ours is not among them.
    assert not {"sglang-kernel", "sgl-kernel"} & extra()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_without_a_gpu_nothing_of_it_is_installed() -> None:
    assert not any(name in setup_commands("0") for name in extra())
