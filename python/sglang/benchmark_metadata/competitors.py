"""Methods that a server does not offer, since others beat them: measured beside those, and held to the same
bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sglang.srt.layers.attention.nsa.metadata_generators import (
    Destination,
    FusedGenerator,
    Generator,
    TorchGenerator,
)
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs
from sglang.srt.layers.attention.nsa.paths import MetadataMethods
from sglang.srt.layers.attention.nsa.replicate import COPIERS, Copier, FusedCopier, Region


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

        self.run = BatchedCopy(regions).run


class FusedEachCopier:
    """The library's copy kernel once for each backend: what one launch for all is compared with."""

    def __init__(self, regions: Sequence[Region]) -> None:
        backends = max(len(region.dsts) for region in regions)
        groups: list[list[Region]] = [[] for _ in range(backends)]
        for region in regions:
            for group, dst in zip(groups, region.dsts):
                group.append(Region(region.src, (dst,), region.cols_per))
        self.copiers = [FusedCopier(group) for group in groups]

    def run(self, max_len: int) -> None:
        for copier in self.copiers:
            copier.run(max_len)


class ColumnGenerator(FusedGenerator):
    """The library's generation where slots may be anywhere: it reads that of every column."""

    def __init__(self, inputs: MetadataInputs, destinations: Sequence[Destination]) -> None:
        super().__init__(replace(inputs, whole_pages=False), destinations)


COMPETITORS: dict[str, type[Copier]] = {
    "foreach": ForeachCopier,
    "streams": StreamsCopier,
    "cat": CatCopier,
    "triton": TritonCopier,
    "fused_n": FusedEachCopier,
}
NEEDS_CUDA = ("streams", "triton")
ALL_COPIERS: dict[str, type[Copier] | None] = {**COPIERS, **COMPETITORS, "-": None}
GENERATORS: dict[str, type[Generator]] = {
    "torch": TorchGenerator,
    "fused": FusedGenerator,
    "columns": ColumnGenerator,
}


def methods_of(copy: str, generator: str = "fused") -> MetadataMethods:
    """Methods by name, of the server's and of the competitors."""
    return MetadataMethods(copy, GENERATORS[generator], ALL_COPIERS[copy])
