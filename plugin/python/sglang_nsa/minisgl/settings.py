"""What the user chose: MINISGL_USE_FUSED_COPY, read once in each process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum

VARIABLE = "MINISGL_USE_FUSED_COPY"


class Mode(Enum):
    OFF = "0"  # mini-sglang untouched
    FUSED = "1"  # one launch instead of six copies
    IN_GRAPH = "in_graph"  # one packed copy to the device; the rest is generated inside the captured graph

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Mode:
        """Words as mini-sglang's own flags take them. Raises ValueError naming the variable and its value."""
        text = environ.get(VARIABLE, "").strip().lower()
        words = {"": cls.OFF, **dict.fromkeys(("0", "false", "no"), cls.OFF)}
        words |= {**dict.fromkeys(("1", "true", "yes"), cls.FUSED), "in_graph": cls.IN_GRAPH}
        if text not in words:
            raise ValueError(f"{VARIABLE}: expected 0, 1 or in_graph, found {environ[VARIABLE]!r}")
        return words[text]
