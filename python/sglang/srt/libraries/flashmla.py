"""Finds DeepSeek's FlashMLA kernels where a package that carries them is installed.

The real sgl-kernel carries them under the import name of our own kernel library, so it is found by its
distribution, and only its operators are loaded.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

OPERATOR_DISTRIBUTIONS = ("sglang-kernel", "sgl-kernel")  # the wheel's new name and its old one
MODULES = ("sgl_flash_mla", "flash_mla")  # packages of FlashMLA alone
HEAD_COUNTS = (64, 128)  # that the kernels are compiled for


@dataclass(frozen=True)
class FlashMLALibrary:
    """The kernels with the real sgl-kernel's arguments; each returns its result first."""

    source: str
    # Attends over a bfloat16 cache:
    # (q [T, H, 576], kv [slots, 1, 576], indices [T, 1, topk] int32, scale, 512) -> [out [T, H, 512], ...]
    sparse_fwd: Callable[..., Sequence[torch.Tensor]]
    # Divides decode's work: (lens [T] int32, H, 1, H, is_fp8, topk) -> [metadata [parts, 8], splits [T + 1]]
    decode_metadata: Callable[..., Sequence[torch.Tensor]] | None = None
    # Attends over an FP8 cache: (q [T, 1, H, 576], kv [blocks, 64, 1, 656], 512, lens, block table [T, 0],
    # scale, causal, metadata, splits, is_fp8, indices [T, 1, topk]) -> [out [T, 1, H, 512], ...]
    decode: Callable[..., Sequence[torch.Tensor]] | None = None
    takes_lengths: bool = False  # `sparse_fwd` has topk_length [T], int32: looks at no slot beyond


@functools.cache
def load_flashmla(with_decode: bool = False) -> FlashMLALibrary:
    """The first library found, the newer packages first; `with_decode`: the first that has its decode kernel.

    Raises ImportError with what was looked for and why each was no good.
    """
    reasons = []
    for name in (*MODULES, *OPERATOR_DISTRIBUTIONS):
        try:
            library = find_flashmla(name)
            if not with_decode or library.decode is not None:
                return library
            reasons.append(f"{name}: no decode kernel with the arguments of sgl-kernel")
        except (ImportError, OSError, AttributeError) as error:
            because = f" ({error.__cause__})" if isinstance(error.__cause__, OSError) else ""
            reasons.append(f"{name}: {error}{because}")
    raise ImportError("FlashMLA is not available (" + "; ".join(reasons) + ")")


def find_flashmla(name: str) -> FlashMLALibrary:
    """One of MODULES or OPERATOR_DISTRIBUTIONS. Raises ImportError, OSError or AttributeError."""
    return _from_module(name) if name in MODULES else _from_distribution(name)


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
    sparse_fwd = operators.sparse_prefill_fwd.default
    return FlashMLALibrary(
        f"{name} {distribution.version}",
        sparse_fwd,
        operators.get_mla_decoding_metadata.default,
        operators.fwd_kvcache_mla.default,
        any(argument.name == "topk_length" for argument in sparse_fwd._schema.arguments),
    )


def _from_module(name: str) -> FlashMLALibrary:
    """A package of its own, whose decode has changed its arguments too often to rely on."""
    module = importlib.import_module(name)
    sparse_fwd = module.flash_mla_sparse_fwd
    parameters = inspect.signature(sparse_fwd).parameters
    takes_lengths = "topk_length" in parameters
    if "use_legacy" not in parameters:
        return FlashMLALibrary(name, sparse_fwd, takes_lengths=takes_lengths)
    # SGLang's fork keeps the kernels for keys of 576 dimensions, and all of Hopper's, apart.
    if not module.has_legacy():
        raise ImportError(f"version {module.__version__} was built without the kernels of DeepSeek-V3.2")
    without_statistics = functools.partial(sparse_fwd, use_legacy=True, return_log2_lse=False)
    source = f"{name} {module.__version__}"
    return FlashMLALibrary(source, without_statistics, takes_lengths=takes_lengths)
