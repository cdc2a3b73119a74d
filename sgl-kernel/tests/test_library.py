"""Finding and loading the compiled library: where it is searched, what errors say, that it can be moved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Protocol

import pytest
import sgl_kernel
import torch
from forked import ForkedProcess, run_code
from sgl_kernel import _library

PACKAGE = Path(sgl_kernel.__file__).resolve().parent


class RunPython(Protocol):
    def __call__(self, code: str, *, path: Path = ..., **environment: str) -> str: ...


@pytest.fixture
def run_python(tmp_path_factory: pytest.TempPathFactory) -> RunPython:
    """Runs code in a process that has not imported sgl_kernel; gives its output, and fails where it does."""

    def run(code: str, *, path: Path = PACKAGE.parent, **environment: str) -> str:
        env = {k: v for k, v in os.environ.items() if k != "SGL_KERNEL_LIBRARY_DIR"} | environment
        log = tmp_path_factory.mktemp("process") / "output"
        process = ForkedProcess(run_code, code, [str(path)], env=env, log=log)
        assert process.wait(60) == 0, log.read_text()
        return log.read_text()

    return run


def library_path(device_type: str) -> Path:
    name = f"libsgl_kernel_{device_type}.so"
    return next(d / name for d in _library.search_directories() if (d / name).is_file())


def test_import_loads_nothing(run_python: RunPython) -> None:
    out = run_python("import sgl_kernel, sgl_kernel._library as l; print(len(l._loaded))")
    assert out.strip() == "0"


USE_WITHOUT_LIBRARY = """
import torch, sgl_kernel
assert not sgl_kernel.available("cpu")
try:
    a, b = torch.zeros(2, 4, dtype=torch.int32)
    sgl_kernel.FusedMetadataCopyPlan([sgl_kernel.CopyRegion(a, (b,))])
except RuntimeError as error:
    assert str(error) == sgl_kernel.load_error("cpu")
    print(error)
"""


def test_missing_library(run_python: RunPython, tmp_path: Path) -> None:
    out = run_python(USE_WITHOUT_LIBRARY, SGL_KERNEL_LIBRARY_DIR=str(tmp_path))
    assert f"libsgl_kernel_cpu.so was not found in {tmp_path}" in out


def test_broken_library(run_python: RunPython, tmp_path: Path) -> None:
    (tmp_path / "libsgl_kernel_cpu.so").write_bytes(b"no library")
    out = run_python(USE_WITHOUT_LIBRARY, SGL_KERNEL_LIBRARY_DIR=str(tmp_path))
    assert f"libsgl_kernel_cpu.so does not load under torch {torch.__version__}" in out


def test_override_directory(run_python: RunPython) -> None:
    directory = library_path("cpu").parent
    code = "import sgl_kernel; print(sgl_kernel.load_error('cpu'))"
    assert run_python(code, SGL_KERNEL_LIBRARY_DIR=str(directory)).strip() == "None"


@pytest.mark.parametrize(
    ("newer", "reason"),
    {
        "another ABI": (
            "l.ABI_VERSION = 99",
            f"has ABI version {_library.ABI_VERSION}, this package needs 99",
        ),
        "and fewer operators": (
            "l.ABI_VERSION = 99; l.WRITING_OPERATORS += ('tomorrows_run',)",
            f"has ABI version {_library.ABI_VERSION}, this package needs 99",
        ),
        "fewer operators alone": ("l.WRITING_OPERATORS += ('tomorrows_run',)", "lacks tomorrows_run"),
    }.values(),
)
def test_stale_library(newer: str, reason: str, run_python: RunPython) -> None:
    """A build of an older version under newer Python code gives the reason; it ended in a traceback of
    `register_fake` where the newer code had an operator more."""
    code = f"import sgl_kernel._library as l; {newer}; print(l.load_error('cpu'))"
    assert f"the cpu library {reason}: build it anew" in run_python(code)


@pytest.mark.parametrize("first", ["sgl_kernel", "elsewhere.kernels"])
def test_package_under_another_name(run_python: RunPython, first: str, tmp_path: Path) -> None:
    """A plugin ships the package and the library inside its own; both copies work in one process."""
    moved = tmp_path / "elsewhere" / "kernels"
    shutil.copytree(PACKAGE, moved, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(library_path("cpu"), moved)
    code = f"""
import importlib, sys, torch
sys.path.insert(0, {str(PACKAGE.parent)!r})
names = sorted(("sgl_kernel", "elsewhere.kernels"), key=lambda name: name != {first!r})
for kernels in map(importlib.import_module, names):
    source, destination = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    kernels.FusedMetadataCopyPlan([kernels.CopyRegion(source, (destination,))]).run()
    assert torch.equal(source, destination)
    print(kernels.load_error("cpu"))
"""
    assert run_python(code, path=tmp_path).split() == ["None", "None"]


def test_unknown_device_type() -> None:
    assert not sgl_kernel.available("tpu")
    assert "expected one of cpu, cuda, found tpu" in sgl_kernel.load_error("tpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_library_under_a_cpu_torch() -> None:
    """It says why, whether it was not built or cannot be loaded."""
    assert not sgl_kernel.available("cuda")
    assert "libsgl_kernel_cuda.so" in sgl_kernel.load_error("cuda")
