"""`python -m sglang_nsa doctor`: what is installed, what the plugin would do with it, and why."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform

import torch

from .family import Installed, UnsupportedError, find_installed
from .nsa.kernels import load_kernels
from .real_classes import Sizes, build_wrapper, token_table
from .settings import PRECOMPUTE_FLAGS, Settings
from .trial import run_trial


def report() -> tuple[list[tuple[str, str]], bool]:
    """(what, finding) lines, and whether the plugin would serve."""
    lines = [(name, _version(name)) for name in ("sglang", "sglang-nsa-plugin")]
    lines.append(("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"))
    lines.append(("python", platform.python_version()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: checked on the CPU"
    lines.append(("device", gpu))
    lines.append(("kernel library", _library(device)))
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        return [*lines, ("settings", f"refused: {error}")], False
    lines.append(("settings", ", ".join(f"{name} {value}" for name, value in vars(settings).items())))
    lines.append(("plugins allowed", os.environ.get("SGLANG_PLUGINS") or "all"))
    if not settings.enabled:
        return [*lines, ("layout", f"none: {' / '.join(PRECOMPUTE_FLAGS)} is 0")], False
    serves = False
    for kind in settings.backends:
        found, does = _kind(kind, settings, device)
        lines += [(f"{kind}: {what}", finding) for what, finding in found]
        serves |= does
    return lines, serves


def _kind(kind: str, settings: Settings, device: torch.device) -> tuple[list[tuple[str, str]], bool]:
    """What would be done with one kind of draft backend, and whether it would be served."""
    try:
        installed = find_installed(kind)
    except UnsupportedError as error:
        return [("layout", f"none: {error}")], False
    except Exception as error:
        return [("layout", f"none: SGLang does not import: {type(error).__name__}: {error}")], False
    found, serves = _layout(installed, settings, device)
    return [*_seams(installed), *found], serves


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _library(device: torch.device) -> str:
    try:
        return f"loads for {device.type}: {os.path.dirname(load_kernels(device.type).__file__)}"
    except ImportError as error:
        return f"missing: {error}"


def _seams(installed: Installed) -> list[tuple[str, str]]:
    family = installed.family
    lines = [("family", f"{family.name}: {family.module}.{family.wrapper}")]
    lines += [("seam", f"{name}({', '.join(arguments)})") for name, arguments in family.methods.items()]
    return lines


def _layout(
    installed: Installed, settings: Settings, device: torch.device
) -> tuple[list[tuple[str, str]], bool]:
    """The trial that a server makes at its start, on SGLang's real classes without a model."""
    sizes = Sizes()
    wrapper = build_wrapper(installed, sizes, token_table(sizes, device), 4)
    if device.type == "cpu" and installed.family.fields.by_step and not _interpreted():
        said = f"{settings.layout}, if a trial on the GPU agrees: SGLang's own path is Triton"
        return [("layout", said)], True
    try:
        result = run_trial(installed, wrapper)
    except Exception as error:
        return [("layout", f"none: {error}")], False
    layout = settings.layout
    if result.generator is not None:
        if installed.family.fields.by_step:
            return [("layout", f"none: {result.generator}")], False
        if layout == "in_graph":
            layout = f"shared instead of in_graph: {result.generator}"
    by = "one launch of the plugin" if result.generator is None else f"SGLang's own path ({result.generator})"
    lines = [("layout", layout), ("refreshed by", by)]
    if installed.family.fields.topk is not None:
        known = "in whole pages with SGLang's paged allocator of the same page size, else anywhere"
        lines.append(("slots", f"{known}: the server's log says which"))
        share = (
            "known once a model is loaded: the server's log says whether draft steps reuse the top-k"
            if installed.family.prefix == "dsa"
            else "not in this release"
        )
        lines.append(("IndexShare", share))
    return lines, True


def _interpreted() -> bool:
    """Whether Triton kernels run without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def print_report() -> bool:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    lines, serves = report()
    for what, finding in lines:
        print(f"{what:<20} {finding}")
    return serves
