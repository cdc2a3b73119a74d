"""For tests alone, first on the import path of an SGLang server: `sgl_kernel.flash_attn` is the stand-in
here, since FlashAttention 3's library is too large to carry everywhere. SGLang itself is not changed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

STAND_IN = Path(__file__).with_name("fa3_calls.py")  # not by a name that others look for


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.util.spec_from_file_location(name, STAND_IN)
            if name == "sgl_kernel.flash_attn"
            else None
        )


sys.meta_path.insert(0, _Finder())
