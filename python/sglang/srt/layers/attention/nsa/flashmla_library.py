"""Finds DeepSeek's FlashMLA kernels where a package that carries them is installed.

The real sgl-kernel carries them under the import name of our own kernel library, so it is found by its
distribution, and only its operators are loaded.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

OPERATOR_DISTRIBUTIONS = ("sglang-kernel", "sgl-kernel")  # the wheel's new name and its old one
MODULES = ("sgl_flash_mla", "flash_mla")  # packages of FlashMLA alone
HEAD_COUNTS = (64, 128)  # that the kernels are compiled for


@dataclass(frozen=True)
class FlashMLALibrary:
    """The sparse prefill kernel: attends to the given rows of a bfloat16 cache."""

    source: str
    # (q [T, H, 576], kv [slots, 1, 576], indices [T, 1, topk] int32, scale, 512) -> (out [T, H, 512], ...)
    sparse_fwd: Callable[..., tuple[torch.Tensor, ...] | list[torch.Tensor]]


@functools.cache
def load_flashmla() -> FlashMLALibrary:
    """The first library found. Raises ImportError with what was looked for and why each was no good."""
    reasons = []
    for find, names in ((_from_distribution, OPERATOR_DISTRIBUTIONS), (_from_module, MODULES)):
        for name in names:
            try:
                return find(name)
            except (ImportError, OSError, AttributeError) as error:
                because = f" ({error.__cause__})" if isinstance(error.__cause__, OSError) else ""
                reasons.append(f"{name}: {error}{because}")
    raise ImportError("FlashMLA is not available (" + "; ".join(reasons) + ")")


def _from_distribution(name: str) -> FlashMLALibrary:
    """The operators of an installed wheel, without importing its package."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ImportError("not installed") from error
    files = [f for f in distribution.files or () if f.name.startswith("flashmla_ops")]
    paths = [path for path in (Path(distribution.locate_file(f)) for f in files) if path.exists()]
    if not paths:
        raise ImportError(f"version {distribution.version} carries no flashmla_ops")
    torch.ops.load_library(str(paths[0]))
    operators = torch.ops.sgl_kernel
    return FlashMLALibrary(f"{name} {distribution.version}", operators.sparse_prefill_fwd.default)


def _from_module(name: str) -> FlashMLALibrary:
    module = importlib.import_module(name)
    return FlashMLALibrary(name, module.flash_mla_sparse_fwd)
