"""Builds a library that an installation lacks, once, into a cache folder: SGL_KERNEL_JIT=1.

The folder is SGL_KERNEL_CACHE_DIR, by default ~/.cache/sgl_kernel_nsa. Processes that need the same build
wait for one of them; what an interrupted build left behind is removed by the next. Needs cmake, a C++
compiler and for CUDA nvcc.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

JIT_VARIABLE = "SGL_KERNEL_JIT"
CACHE_DIR_VARIABLE = "SGL_KERNEL_CACHE_DIR"


class BuildError(RuntimeError):
    """The library could not be built; says why, with the end of the compiler's output."""


def enabled() -> bool:
    value = os.environ.get(JIT_VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise RuntimeError(f"{JIT_VARIABLE}: expected 0 or 1, found {value!r}")
    return value == "1"


def build(device_type: str) -> Path:
    """The library of "cpu" or "cuda" in the cache, built if it is not there. Raises BuildError."""
    name, sources = f"libsgl_kernel_{device_type}.so", _sources()
    cmake = shutil.which("cmake")
    if cmake is None:
        raise BuildError(f"{JIT_VARIABLE}=1: cmake was not found")
    options = _options(device_type)
    default = Path.home() / ".cache" / "sgl_kernel_nsa"
    cache = Path(os.environ.get(CACHE_DIR_VARIABLE) or default)
    target = cache / f"{device_type}-{_key(sources, options)}"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if not (target / name).is_file():
            building = target.with_suffix(".building")
            shutil.rmtree(building, ignore_errors=True)  # of a process that ended: the lock is ours
            _compile(cmake, sources, building, device_type, options)
            target.mkdir(exist_ok=True)
            os.replace(building / name, target / name)
            shutil.rmtree(building)
    return target / name


def _sources() -> Path:
    package = Path(__file__).resolve().parent
    for folder in (package / "sources", package.parent.parent):  # a wheel, a source tree
        if (folder / "CMakeLists.txt").is_file() and (folder / "csrc").is_dir():
            return folder
    raise BuildError(f"{JIT_VARIABLE}=1: this installation carries no sources ({package / 'sources'})")


def _options(device_type: str) -> list[str]:
    options = ["-DSGL_KERNEL_EMULATION=OFF", f"-DSGL_KERNEL_CUDA={'ON' if device_type == 'cuda' else 'OFF'}"]
    if device_type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}")
    return options


def _key(sources: Path, options: list[str]) -> str:
    """Names a build: another source, torch or option is another build."""
    digest = hashlib.sha256(repr((torch.__version__, torch.__file__, options)).encode())
    files = [sources / "CMakeLists.txt", *(p for d in ("csrc", "include") for p in (sources / d).rglob("*"))]
    for path in sorted(p for p in files if p.is_file()):
        digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("sgl_kernel: waiting for another process that builds %s", path.stem)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(cmake: str, sources: Path, building: Path, device_type: str, options: list[str]) -> None:
    started = time.monotonic()
    log = building.with_suffix(".log")
    logger.warning(
        "sgl_kernel: building the %s library in %s (a minute or two, once); log: %s",
        device_type,
        building,
        log,
    )
    configure = [
        cmake,
        "-S",
        str(sources),
        "-B",
        str(building),
        f"-DPython_EXECUTABLE={sys.executable}",
        *options,
    ]
    make = [cmake, "--build", str(building), "--target", f"sgl_kernel_{device_type}", "--parallel"]
    with log.open("wb") as output:
        for command in (configure, make):
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            if done.returncode != 0:
                end = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
                what = f"{JIT_VARIABLE}=1: building the {device_type} library failed"
                raise BuildError(f"{what} (the whole log: {log}):\n{end}")
    logger.warning("sgl_kernel: built the %s library in %.0f s", device_type, time.monotonic() - started)
