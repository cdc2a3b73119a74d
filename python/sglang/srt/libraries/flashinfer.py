"""FlashInfer (https://docs.flashinfer.ai), where a version with the functions used here is installed."""

from __future__ import annotations

import functools
import importlib
import re
from importlib import metadata
from types import ModuleType

OLDEST_VERSION = (0, 6, 11)


@functools.cache
def load_flashinfer(submodule: str) -> ModuleType:
    """The module `flashinfer.<submodule>`. Raises ImportError with the reason."""
    try:
        version = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError as error:
        raise ImportError("flashinfer-python is not installed") from error
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise ImportError(f"flashinfer-python {oldest} or later is needed, found {version}")
    try:
        return importlib.import_module(f"flashinfer.{submodule}")
    except Exception as error:  # it imports much that may be missing or broken in ways of its own
        raise ImportError(f"flashinfer-python {version} does not import: {error!r}") from error
