"""The kernel library, wherever it is installed: beside this package in the plugin, else `sgl_kernel`."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

_OLDEST = 11  # ABI version: a library before it does not know all that the core asks for


def load_kernels(device_type: str) -> ModuleType:
    """The library with operators for `device_type`. Raises ImportError with the reason."""
    parent = __package__.rpartition(".")[0]  # empty where this package is a top-level one
    beside = f"{parent}.sgl_kernel"
    try:
        library = importlib.import_module(
            beside if parent and importlib.util.find_spec(beside) else "sgl_kernel"
        )
    except ImportError as error:
        raise ImportError(f"the kernel library is not installed: {error}") from error
    version = getattr(library, "ABI_VERSION", 0)
    if version < _OLDEST:
        raise ImportError(
            f"the installed sgl_kernel ({library.__file__}) is another library than sgl-kernel-nsa, "
            f"or an older one: ABI version {version}, expected at least {_OLDEST}"
        )
    if not library.available(device_type):
        raise ImportError(
            f"the kernel library has no operators for {device_type}: {library.load_error(device_type)}"
        )
    return library
