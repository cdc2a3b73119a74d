"""The extra `gpu`: what `make setup` installs of it where an NVIDIA GPU is seen."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from server_fixture import ROOT


def setup_commands(gpus: str, path: str = os.environ["PATH"]) -> str:
    make = [shutil.which("make"), "-n", "setup", f"GPU={gpus}", "VENV=/nonexistent/.venv"]
    env = os.environ | {"PATH": path}
    return subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def extra() -> set[str]:
    (listed,) = re.findall(r"^gpu = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    return set(re.findall(r'"([\w-]+)', listed))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_setup_installs_the_extra_with_pinned_versions_and_our_kernels_first() -> None:
    commands = setup_commands("1")
    installed = re.findall(r"pip install .* -c constraints-gpu.txt (?:--no-deps )?([\w -]+)$", commands, re.M)
    assert extra() <= {name for line in installed for name in line.split()}
    pins = (ROOT / "constraints-gpu.txt").read_text()
    assert all(re.search(rf"^{name}==", pins, re.M) for name in extra())
    assert commands.index("./sgl-kernel") < commands.index("flashinfer-python")
    # What brings a package of the name of ours is not among them.
    assert not {"sglang-kernel", "sgl-kernel"} & extra()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("gpus", "has_nvcc", "installed"), [("1", False, True), ("1", True, False), ("0", False, False)]
)
def test_a_compiler_is_installed_where_a_gpu_has_none(
    tmp_path: Path, gpus: str, has_nvcc: bool, installed: bool
) -> None:
    """Bug: without a toolkit on the machine our kernels were built for the CPU alone."""
    for name in ("sh", "find", "grep"):
        (tmp_path / name).symlink_to(shutil.which(name))
    if has_nvcc:
        (tmp_path / "nvcc").touch(mode=0o755)
    commands = setup_commands(gpus, str(tmp_path))
    kernels = next(line for line in commands.splitlines() if line.endswith("./sgl-kernel"))
    compiler = 'CUDACXX="/nonexistent/.venv/cuda/bin/nvcc"'
    assert ("cuda-toolkit[nvcc" in commands, compiler in kernels) == (installed, installed)
    if installed:
        assert commands.index("cuda-toolkit[nvcc") < commands.index(kernels)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_parts_of_the_compiler_are_of_one_release(tmp_path: Path) -> None:
    """Bug: nvcc takes any nvvm and crt, pip took the newest, and ptxas refused what that nvvm had written."""
    for name in ("sh", "find", "grep"):
        (tmp_path / name).symlink_to(shutil.which(name))
    (parts,) = re.findall(r"cuda-toolkit\[([\w,]+)\]", setup_commands("1", str(tmp_path)))
    assert {"nvcc", "nvvm", "crt"} <= set(parts.split(","))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_without_a_gpu_nothing_of_it_is_installed() -> None:
    assert not any(name in setup_commands("0") for name in extra())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("gpus", "kind"), [("0", "cpu"), ("2", "gpu")])
def test_every_install_takes_one_set_of_pins_and_torch_is_in_one_of_its_files(gpus: str, kind: str) -> None:
    """Bug: a machine with a GPU got the torch of the CPU's tests, which had never run on a GPU."""
    files = ["constraints.txt", f"constraints-{kind}.txt"]
    lines = [line for line in setup_commands(gpus).splitlines() if "pip install" in line and "-c " in line]
    assert lines
    assert all(re.findall(r"-c (\S+)", line) == files for line in lines)
    pins = re.findall(r"^([\w.-]+)==", "".join((ROOT / file).read_text() for file in files), re.M)
    assert pins.count("torch") == 1
    assert len(pins) == len(set(pins))
