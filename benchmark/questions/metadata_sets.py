"""The metadata of a DECODE step as the kernel benchmark lays it out: one source set, N backends' buffers."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "sgl-kernel" / "benchmark"))

from buffer_sets import CopySets, GenerateSets

from .pairs import Pairs

__all__ = ["CopySets", "GenerateSets", "pairs_of"]


def pairs_of(sets: CopySets) -> Pairs:
    """Its live fields, sliced out of wider buffers: six of each backend, two of them tables."""
    return Pairs(tuple(sets.flat_sources), tuple(sets.flat_dsts))
