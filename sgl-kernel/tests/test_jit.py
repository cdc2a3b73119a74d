"""SGL_KERNEL_JIT=1: an installation without libraries builds what it lacks, once."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import sgl_kernel
from forked import ForkedProcess, run_code

PACKAGE = Path(sgl_kernel.__file__).resolve().parent
TREE = Path(__file__).resolve().parent.parent
COPY = """
import logging, torch, sgl_kernel
logging.basicConfig()
a, b = torch.arange(8).view(2, 4).int()
sgl_kernel.FusedMetadataCopyPlan([sgl_kernel.CopyRegion(a, (b,))]).run()
assert torch.equal(a, b)
"""

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """What a wheel without libraries leaves: the package and its sources."""
    package = tmp_path / "site" / "sgl_kernel"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so", "sources"))
    for name in ("csrc", "include"):
        shutil.copytree(TREE / name, package / "sources" / name)
    shutil.copy(TREE / "CMakeLists.txt", package / "sources")
    return package.parent


class Process(ForkedProcess):
    """Runs code with `installed` first on its path, and SGL_KERNEL_JIT=1."""

    def __init__(self, code: str, installed: Path, **environment: str) -> None:
        inherited = {k: v for k, v in os.environ.items() if k != "SGL_KERNEL_LIBRARY_DIR"}
        cache = {"SGL_KERNEL_CACHE_DIR": str(installed / "cache"), "SGL_KERNEL_JIT": "1"}
        cache["CMAKE_BUILD_TYPE"] = "Quick"  # none that CMake knows: compiled without optimization
        file, self.log = tempfile.mkstemp(dir=installed)
        os.close(file)
        env = {**inherited, **cache, **environment}
        super().__init__(run_code, code, [str(installed)], env=env, log=self.log)

    def output(self) -> str:
        self.wait(500)
        return Path(self.log).read_text()


def run(code: str, installed: Path, **environment: str) -> tuple[int | None, str]:
    process = Process(code, installed, **environment)
    return process.wait(500), process.output()


def test_two_processes_build_once(installed: Path) -> None:
    """Over what a build that was killed left behind; a third process finds it built."""
    cache = installed / "cache"
    code = "import sgl_kernel._jit as j; print(j._key(j._sources(), j._options('cpu')))"
    _, key = run(code, installed)
    left = cache / f"cpu-{key.strip()}.building"
    left.mkdir(parents=True)
    (left / "CMakeCache.txt").write_text("half of a file")
    processes = [Process(COPY, installed) for _ in range(2)]
    outputs = [process.output() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("built the cpu library" in output for output in outputs) == 1, outputs
    assert not left.exists()
    returncode, output = run(COPY, installed)
    assert returncode == 0 and "build" not in output, output


def test_a_broken_compiler(installed: Path) -> None:
    returncode, output = run(
        "import sgl_kernel; print(sgl_kernel.load_error('cpu'))", installed, CXX="/bin/false"
    )
    assert returncode == 0
    assert "SGL_KERNEL_JIT=1: building the cpu library failed (the whole log: " in output
    assert "/bin/false" in output


def test_without_the_variable(installed: Path) -> None:
    for value, message in (
        ("0", "was not found in"),
        ("yes", "SGL_KERNEL_JIT: expected 0 or 1, found 'yes'"),
    ):
        _, output = run(
            "import sgl_kernel; print(sgl_kernel.load_error('cpu'))", installed, SGL_KERNEL_JIT=value
        )
        assert message in output


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.gpu
def test_cuda(installed: Path, cuda: str) -> None:
    returncode, output = run(COPY.replace(".int()", ".int().cuda()"), installed)
    assert returncode == 0 and "built the cuda library" in output, output
