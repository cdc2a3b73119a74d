"""Finds and loads the compiled libraries, one per device type, once per process.

Searched: the directory named by SGL_KERNEL_LIBRARY_DIR alone if it is set; else this package's directory (a
wheel) and then the build directory of a source tree. A library that fails to load is not tried again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _jit

logger = logging.getLogger(__name__)

DEVICE_TYPES = ("cpu", "cuda")
ABI_VERSION = 11  # kAbiVersion of include/sgl_kernel_ops.h
LIBRARY_DIR_VARIABLE = "SGL_KERNEL_LIBRARY_DIR"
PLANNED_OPERATORS = (
    "decode_inputs",
    "fused_metadata_copy",
    "nsa_metadata_generate",
    "paged_mqa_schedule",
)
WRITING_OPERATORS = (
    *(f"{name}_{kind}" for name in PLANNED_OPERATORS for kind in ("run", "once")),
    *(f"replay_copy_run_{sources}" for sources in range(1, 13)),
    "replay_copy_once",
    "fused_metadata_copy",
    "fused_metadata_copy_multi",
    "fused_copy_replay_data",
    "index_scores",
    "topk_slots",
)


@dataclass(frozen=True)
class _Loaded:
    ops: Any | None  # torch.ops.sgl_kernel_nsa_<device type>
    error: str | None


def available(device_type: str) -> bool:
    """Whether the library of "cpu" or "cuda" is there and loads."""
    return device_type in DEVICE_TYPES and _load(device_type).ops is not None


def load_error(device_type: str | None = None) -> str | None:
    """Why the library of a device type does not load (with what was searched), or None if it does.

    Without an argument: of "cuda" where torch sees a CUDA device, else of "cpu".
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return _load(device_type).error if device_type in DEVICE_TYPES else _unknown_device(device_type)


def operator(device_type: str, name: str) -> Any:
    """One operator overload of a device's library; RuntimeError with the reason if the library is missing."""
    if device_type not in DEVICE_TYPES:
        raise RuntimeError(_unknown_device(device_type))
    loaded = _loaded.get(device_type) or _load(
        device_type
    )  # a compiler reads the dictionary, and cannot load
    if loaded.ops is None:
        raise RuntimeError(loaded.error)
    return getattr(loaded.ops, name).default


def entry(device_type: str, name: str) -> Callable[..., None]:
    """The same without OpOverload's own Python call around it: what is called once a step."""
    overload = operator(device_type, name)
    return getattr(overload, "_op", overload)


def search_directories() -> list[Path]:
    override = os.environ.get(LIBRARY_DIR_VARIABLE)
    if override:
        return [Path(override)]
    package = Path(__file__).resolve().parent
    return [package, package.parent.parent / "build"]


def _unknown_device(device_type: str) -> str:
    return f"sgl_kernel: device type: expected one of {', '.join(DEVICE_TYPES)}, found {device_type}"


_loaded: dict[str, _Loaded] = {}  # by device type


def _load(device_type: str) -> _Loaded:
    """The library of a device type, loaded at the first call."""
    if device_type not in _loaded:
        _loaded[device_type] = _load_anew(device_type)
    return _loaded[device_type]


def _load_anew(device_type: str) -> _Loaded:
    ops = getattr(torch.ops, f"sgl_kernel_nsa_{device_type}")
    absent = not hasattr(ops, "abi_version")  # another copy of this package may have loaded it already
    reason = (_load_file(device_type) if absent else None) or _other_version(device_type, ops)
    if reason is not None:
        return _Loaded(None, reason)
    if absent:
        for name in WRITING_OPERATORS:
            torch.library.register_fake(f"sgl_kernel_nsa_{device_type}::{name}", _write_nothing)
    return _Loaded(ops, None)


def _other_version(device_type: str, ops: Any) -> str | None:
    """What tells that a library is not of this package's version: an older build, or a newer one."""
    found = ops.abi_version() if hasattr(ops, "abi_version") else None
    if found != ABI_VERSION:
        reason = f"has ABI version {found}, this package needs {ABI_VERSION}"
    else:
        missing = [name for name in WRITING_OPERATORS if not hasattr(ops, name)]
        if not missing:
            return None
        reason = f"lacks {', '.join(missing)}"
    return f"sgl_kernel: the {device_type} library {reason}: build it anew"


def _load_file(device_type: str) -> str | None:
    """Loads the first library found; returns the reason if there is none or it does not load."""
    name = f"libsgl_kernel_{device_type}.so"
    directories = search_directories()
    path = next((d / name for d in directories if (d / name).is_file()), None)
    if path is None and not os.environ.get(LIBRARY_DIR_VARIABLE) and _jit.enabled():
        try:
            path = _jit.build(device_type)
        except (_jit.BuildError, OSError) as error:
            return f"sgl_kernel: {error}"
    if path is None:
        searched = ", ".join(str(d) for d in directories)
        hint = f"build it with CMake, or set {LIBRARY_DIR_VARIABLE} or {_jit.JIT_VARIABLE}=1"
        return f"sgl_kernel: {name} was not found in {searched} ({hint})"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # torch wraps the dynamic linker's own words
        return f"sgl_kernel: {path} does not load under torch {torch.__version__}: {reason}"
    logger.debug("loaded %s", path)
    return None


def _write_nothing(*arguments: Any) -> None:
    """What a compiler runs in place of an operator that only writes into its arguments."""
