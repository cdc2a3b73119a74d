"""Copies one staging set of metadata into N backends.

A copy is a list of regions planned at capture; the methods differ in how they carry it out at replay. Here
are those that a server can be told to use; what else was tried is measured in `sglang/benchmark_metadata`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .kernels import load_kernels
from .metadata import Extent, NSAMetadata, PrecomputedMetadata, fields_of
from .metadata_generators import FusedGenerator


@dataclass(frozen=True)
class Region:
    """One source and the same place in each destination; `cols_per` p: only ceil(max_len / p) columns."""

    src: torch.Tensor  # [n] or [rows, cols], int32
    dsts: tuple[torch.Tensor, ...]  # each at least as large as src
    cols_per: int = 0

    def pairs(self, max_len: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(source, destination) views of the live extent, one for each destination."""
        if self.src.dim() == 1:
            n = self.src.shape[0]
            return [(self.src, dst[:n]) for dst in self.dsts]
        rows, cols = self.src.shape
        if self.cols_per and max_len >= 0:
            cols = min(cols, -(-max_len // self.cols_per))
        src = self.src[:, :cols]
        return [(src, dst[:rows, :cols]) for dst in self.dsts]


def plan_regions(
    staging: Sequence[PrecomputedMetadata], backends: Sequence[NSAMetadata]
) -> tuple[Region, ...]:
    """The regions that bring `backends` up to date from `staging`.

    One staging set serves all backends, or there is one for each: then only their length vectors differ,
    and the page tables are those of the last, which has the longest rows.
    """
    shape = backends[0].shape
    cols_per = {Extent.TABLE: 1, Extent.PAGED_TABLE: shape.page_size}
    regions = []
    for field in fields_of(shape.mode):
        dsts = [field.of(backend) for backend in backends]
        if field.of(staging[-1]) is None or any(dst is None for dst in dsts):
            continue
        if len(staging) == 1 or field.is_table:
            groups = [(field.of(staging[-1]), tuple(dsts))]
        else:
            groups = [(field.of(source), (dst,)) for source, dst in zip(staging, dsts)]
        regions += [Region(src, dst, cols_per.get(field.extent, 0)) for src, dst in groups]
    return tuple(regions)


class Copier(Protocol):
    """`run` copies the live extent; given a bound of the row lengths (-1: the full tables)."""

    run: Callable[[int], None]


class TorchCopier:
    """One `copy_` for each field of each backend: SGLang's first version."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)

    def run(self, max_len: int) -> None:
        for region in self.regions:
            for src, dst in region.pairs(max_len):
                dst.copy_(src)


class FusedCopier:
    """One launch of the library's kernel, whatever the number of backends."""

    def __init__(self, regions: Sequence[Region]) -> None:
        kernels = load_kernels(regions[0].src.device.type)
        self.plan = kernels.FusedMetadataCopyPlan(
            [kernels.CopyRegion(src=r.src, dsts=r.dsts, cols_per=r.cols_per) for r in regions]
        )
        self.run: Callable[[int], None] = kernels.bind_copy(self.plan)


class FusedReplication:
    """The generation into the staging set and the fused copy out of it: two launches, one call."""

    def __init__(self, generator: FusedGenerator, copier: FusedCopier) -> None:
        kernels = load_kernels(generator.device_type)
        self.run: Callable[[int], None] = kernels.bind_generate_and_copy(generator.plan, copier.plan)


# What layout replicate copies with. None: nothing is copied, the generation writes every backend itself.
COPIERS: dict[str, type[Copier] | None] = {"fused": FusedCopier, "direct": None, "torch": TorchCopier}
NEEDS_KERNELS = ("fused", "direct")  # asked for by name: an error at the start where they cannot be loaded
