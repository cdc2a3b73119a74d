"""What the user chose: environment variables, read once in each process when SGLang loads the plugin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

LAYOUTS = ("shared", "replicate", "in_graph")
BACKENDS = ("nsa", "fa3")
# SGLang's own flag, under its name of each release. From 0.5.15 SGLang itself no longer reads it.
PRECOMPUTE_FLAGS = (
    "SGLANG_DSA_ENABLE_MTP_PRECOMPUTE_METADATA",
    "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA",
)
_WORDS = {"1": True, "true": True, "yes": True, "y": True, "on": True} | {
    "0": False, "false": False, "no": False, "n": False, "off": False,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    enabled: bool = True  # SGLang's own flag; at 0 its path is left untouched
    layout: str = "shared"  # SGLANG_NSA_PLUGIN_LAYOUT
    backends: tuple[str, ...] = BACKENDS  # SGLANG_NSA_PLUGIN_BACKENDS: kinds that are served
    strict: bool = False  # SGLANG_NSA_PLUGIN_STRICT: stop the server instead of leaving SGLang alone
    verify: bool = False  # SGLANG_NSA_VERIFY_METADATA: compare every replay with SGLang's own computation
    alternate: int = 0  # SGLANG_NSA_PLUGIN_ALTERNATE: measure, switching paths every so many replays

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Raises ValueError naming the variable and its value where one does not parse."""
        flags = [_bool(environ, name, True) for name in PRECOMPUTE_FLAGS]
        layout = environ.get("SGLANG_NSA_PLUGIN_LAYOUT", "") or "shared"
        if layout not in LAYOUTS:
            raise ValueError(
                f"SGLANG_NSA_PLUGIN_LAYOUT: expected one of {', '.join(LAYOUTS)}, found {layout!r}"
            )
        return cls(
            enabled=all(flags),
            layout=layout,
            backends=_backends(environ),
            strict=_bool(environ, "SGLANG_NSA_PLUGIN_STRICT", False),
            verify=_bool(environ, "SGLANG_NSA_VERIFY_METADATA", False),
            alternate=_count(environ, "SGLANG_NSA_PLUGIN_ALTERNATE"),
        )


def _bool(environ: Mapping[str, str], name: str, default: bool) -> bool:
    text = environ.get(name, "").strip().lower()
    if text and text not in _WORDS:
        raise ValueError(f"{name}: expected one of {', '.join(_WORDS)}, found {environ[name]!r}")
    return _WORDS.get(text, default)


def _backends(environ: Mapping[str, str]) -> tuple[str, ...]:
    name = "SGLANG_NSA_PLUGIN_BACKENDS"
    wanted = tuple(part.strip() for part in environ.get(name, "").split(",") if part.strip())
    if not set(wanted) <= set(BACKENDS):
        raise ValueError(f"{name}: expected some of {','.join(BACKENDS)}, found {environ[name]!r}")
    return wanted or BACKENDS


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "").strip() or "0"
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name}: expected a number of replays, found {environ[name]!r}")
    return int(text)
