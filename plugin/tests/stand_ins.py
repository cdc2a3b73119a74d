"""Empty modules in place of what needs a GPU, so that SGLang's attention backends import without one.

Nothing of SGLang itself is replaced. A stand-in has whatever is asked of it and does nothing; as a decorator
it returns what it decorates.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, ClassVar

ROOTS = frozenset(
    {
        "IPython",
        "cuda",
        "cutlass",
        "deep_gemm",
        "flashinfer",
        "sentencepiece",
        "sgl_kernel",
        "torch_memory_saver",
        "torchvision",
    }
)
OWN = ("sglang", "sglang_nsa")  # never stood in for


class _EmptyClass(type):
    def __getattr__(cls, name: str) -> Any:
        return _empty(cls, name)

    def __contains__(cls, item: object) -> bool:
        return False

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "_stand_in" not in vars(cls):
            return super().__call__(*args, **kwargs)  # SGLang's own class, with a stand-in as base
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _new(cls.__name__)


def _new(name: str) -> _EmptyClass:
    return _EmptyClass(name, (), {"_stand_in": True})


def _empty(owner: object, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    found = "cpu" if name == "backend" else _new(name)  # what Triton's driver would say it compiles for
    setattr(owner, name, found)
    return found


class _StandIn(ModuleType):
    __path__: ClassVar[list[str]] = []
    __version__ = "1.0"
    __getattr__ = _empty


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, roots: frozenset[str]) -> None:
        self.roots = roots

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(name == root or name.startswith(f"{root}.") for root in self.roots):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Triton itself is the real one, which interprets SGLang's kernels."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.meta_path.insert(0, _Finder(ROOTS))


def import_with_stand_ins(name: str) -> list[str]:
    """Imports a module of SGLang's where other packages are not of the versions that it was released with.

    What it asks of them and they do not have is stood in for; returns the names. Raises what else goes wrong.
    """
    stood_in: list[str] = []
    while True:
        try:
            importlib.import_module(name)
            return stood_in
        except ModuleNotFoundError as error:
            missing = str(error.name)
            if missing.partition(".")[0] in OWN or missing in stood_in:
                raise
            sys.meta_path.append(_Finder(frozenset({missing})))
            stood_in.append(missing)
        except (ImportError, AttributeError) as error:
            owner, attribute = _asked(error)
            if owner is None or owner.__name__.partition(".")[0] in OWN:
                raise
            setattr(owner, attribute, _new(attribute))
            stood_in.append(f"{owner.__name__}.{attribute}")


def _asked(error: ImportError | AttributeError) -> tuple[ModuleType | None, str]:
    """The module and the attribute that it does not have."""
    if isinstance(error, ImportError):
        owner, attribute = sys.modules.get(error.name or ""), getattr(error, "name_from", None)
    else:
        owner, attribute = error.obj, error.name
    return (owner if isinstance(owner, ModuleType) and attribute else None), str(attribute)
