"""Empty modules in place of what needs CUDA, so that SGLang's attention backends import on a CPU.

Nothing of SGLang itself is replaced. A stand-in has whatever is asked of it and does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import ClassVar

ROOTS = frozenset(
    {
        "IPython",
        "cuda",
        "deep_gemm",
        "flashinfer",
        "sentencepiece",
        "sgl_kernel",
        "torch_memory_saver",
        "torchvision",
    }
)


def _empty(owner: object, name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    found = _EmptyClass(name, (), {})
    setattr(owner, name, found)
    return found


class _EmptyClass(type):
    __getattr__ = _empty


class _StandIn(ModuleType):
    __path__: ClassVar[list[str]] = []
    __version__ = "1.0"
    __getattr__ = _empty


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ROOTS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    sys.meta_path.insert(0, _Finder())
