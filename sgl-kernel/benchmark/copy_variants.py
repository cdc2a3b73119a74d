"""Compiles copy_variants.cu with nvcc and launches its kernels; needs no torch headers and no network."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("copy_variants.cu")
MAX_REGIONS = 8
THREADINGS = {"element": 0, "2-D": 1, "warp a row": 2, "piece": 3}


class _Region(ctypes.Structure):
    _fields_ = [
        ("src", ctypes.c_void_p),
        ("dst", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "src_stride", "dst_stride")),
    ]


class _Regions(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("region", _Region * MAX_REGIONS)]


@dataclass(frozen=True)
class Variant:
    """How threads are given to elements."""

    threading: str = "element"  # of THREADINGS
    unit_bytes: int = 4  # of one access: 4 or 16
    block: int = 256  # threads
    explicit: bool = False  # every region a parameter of its own
    max_blocks: int = 1024


def compile_library(folder: Path, arch: str) -> Path:
    """Raises FileNotFoundError where there is no nvcc, RuntimeError with its output where it fails."""
    nvcc = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
    )
    if nvcc is None:
        raise FileNotFoundError("copy_variants.cu needs nvcc: not on PATH and not in $CUDA_HOME/bin")
    target = folder / "libcopy_variants.so"
    command = [
        nvcc,
        "-O3",
        "-std=c++17",
        f"-arch={arch}",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-o",
        target,
        SOURCE,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {SOURCE.name}:\n{done.stderr}")
    return target


@functools.cache
def _library() -> ctypes.CDLL:
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(compile_library(Path(folder), f"sm_{major}{minor}")))
    library.launch_copy.argtypes = [ctypes.POINTER(_Regions), *[ctypes.c_int] * 5, ctypes.c_void_p]
    return library


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _region(src: torch.Tensor, dst: torch.Tensor, flatten: bool) -> _Region:
    """Of tensors [n] or [rows, cols], int32. A source may lie in pinned host memory."""
    rows, cols = (1, src.shape[0]) if src.dim() == 1 else src.shape
    if flatten and src.is_contiguous() and dst.is_contiguous():
        rows, cols = 1, src.numel()
    strides = (src.stride(0), dst.stride(0)) if rows > 1 else (0, 0)
    return _Region(src.data_ptr(), dst.data_ptr(), rows, cols, *strides)


def bind_variant(
    variant: Variant, srcs: Sequence[torch.Tensor], dsts: Sequence[torch.Tensor], flatten: bool = False
) -> Callable[[], None]:
    """A launch of the variant on the current stream. `flatten`: what is contiguous counts as one row."""
    regions = _Regions(
        len(srcs), (_Region * MAX_REGIONS)(*(_region(s, d, flatten) for s, d in zip(srcs, dsts)))
    )
    fixed = (
        THREADINGS[variant.threading],
        variant.unit_bytes,
        int(variant.explicit),
        variant.block,
        variant.max_blocks,
    )
    launch, pointer, alive = _library().launch_copy, ctypes.byref(regions), (regions, srcs, dsts)

    def call(_alive: object = alive) -> None:
        error = launch(pointer, *fixed, _stream())
        if error:
            raise RuntimeError(f"{variant}: CUDA error {error}")

    return call
