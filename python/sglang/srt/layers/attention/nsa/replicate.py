"""Copies one staging set of metadata into N backends.

A copy is a list of regions planned at capture; the methods differ in how they carry it out at replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .kernels import load_kernels
from .metadata import Extent, NSAMetadata, PrecomputedMetadata, fields_of


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
    def run(self, max_len: int) -> None:
        """Copies the live extent; `max_len` bounds the row lengths (-1: the full tables)."""
        ...


class TorchCopier:
    """One `copy_` for each field of each backend: SGLang's first version."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)

    def run(self, max_len: int) -> None:
        for region in self.regions:
            for src, dst in region.pairs(max_len):
                dst.copy_(src)


class ForeachCopier:
    """One `torch._foreach_copy_` over all fields of all backends."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)

    def run(self, max_len: int) -> None:
        srcs, dsts = zip(*(pair for region in self.regions for pair in region.pairs(max_len)))
        torch._foreach_copy_(dsts, srcs)


class StreamsCopier:
    """The copies of each field on a CUDA stream of their own, joined by events."""

    def __init__(self, regions: Sequence[Region]) -> None:
        device = regions[0].src.device
        if device.type != "cuda":
            raise ValueError(f"the copy method 'streams' needs CUDA, the metadata is on {device}")
        self.regions = tuple(regions)
        self.streams = [torch.cuda.Stream(device) for _ in regions]

    def run(self, max_len: int) -> None:
        current = torch.cuda.current_stream()
        for region, stream in zip(self.regions, self.streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for src, dst in region.pairs(max_len):
                    dst.copy_(src)
        for stream in self.streams:
            current.wait_stream(stream)


class CatCopier:
    """All sources concatenated into one flat buffer, from which each backend's fields are copied."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)
        self.flat = regions[0].src.new_empty(sum(region.src.numel() for region in regions))

    def run(self, max_len: int) -> None:
        pairs = [region.pairs(max_len) for region in self.regions]
        sizes = [region_pairs[0][0].numel() for region_pairs in pairs]
        flat = self.flat[: sum(sizes)]
        torch.cat([region_pairs[0][0].reshape(-1) for region_pairs in pairs], out=flat)
        for region_pairs, piece in zip(pairs, flat.split(sizes)):
            for src, dst in region_pairs:
                dst.copy_(piece.view(src.shape))


class TritonCopier:
    """One Triton launch over the table of regions (`triton_batched_copy.py`)."""

    def __init__(self, regions: Sequence[Region]) -> None:
        from .triton_batched_copy import BatchedCopy

        self.copy = BatchedCopy(regions)

    def run(self, max_len: int) -> None:
        self.copy.run(max_len)


class FusedCopier:
    """One launch of the library's kernel, whatever the number of backends."""

    def __init__(self, regions: Sequence[Region]) -> None:
        kernels = load_kernels(regions[0].src.device.type)
        self.plan = kernels.FusedMetadataCopyPlan(
            [kernels.CopyRegion(src=r.src, dsts=r.dsts, cols_per=r.cols_per) for r in regions]
        )

    def run(self, max_len: int) -> None:
        self.plan.run(max_len=max_len)


COPIERS: dict[str, type[Copier]] = {
    "torch": TorchCopier,
    "foreach": ForeachCopier,
    "streams": StreamsCopier,
    "cat": CatCopier,
    "triton": TritonCopier,
    "fused": FusedCopier,
}
