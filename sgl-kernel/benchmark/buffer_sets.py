"""Buffers for the benchmark: of a copy with its N destinations, and of a generation with its N."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import sgl_kernel
import torch

PAGE_SIZE, TOPK = 64, 2048

Run = Callable[[], None]


@dataclass(frozen=True)
class Field:
    name: str
    shape: tuple[int, ...]  # of the source
    live: tuple[slice, ...]
    capacity: tuple[int, ...]  # of a backend's buffer


def decode_fields(bs: int, cols: int) -> list[Field]:
    """DECODE without FlashMLA, in the order of SGLang's calls; a backend's tables are wider than these."""
    pages, width = -(-cols // PAGE_SIZE), 2 * cols
    rows, prefix = slice(0, bs), slice(1, bs + 1)
    return [
        Field("cache_seqlens", (bs,), (rows,), (2 * bs,)),
        Field("cu_seqlens_k", (bs + 1,), (prefix,), (2 * bs + 1,)),
        Field("page_indices", (bs, cols), (rows, slice(0, cols)), (2 * bs, width)),
        Field("nsa_cache_seqlens", (bs,), (rows,), (2 * bs,)),
        Field("nsa_cu_seqlens_k", (bs + 1,), (prefix,), (2 * bs + 1,)),
        Field("real_page_table", (bs, pages), (rows, slice(0, pages)), (2 * bs, width // PAGE_SIZE)),
    ]


class CopySets:
    """One source set and N backends' buffers, with the same copy written in every way that is compared."""

    def __init__(self, device: str, bs: int, cols: int, num_destinations: int) -> None:
        self.bs, self.cols, self.fields = bs, cols, decode_fields(bs, cols)
        generator = torch.Generator().manual_seed(0)

        def random_int32(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randint(0, 2**31 - 1, shape, generator=generator, dtype=torch.int32).to(device)

        self.sources = [random_int32(field.shape) for field in self.fields]
        self.sets = [
            [torch.zeros(field.capacity, dtype=torch.int32, device=device) for field in self.fields]
            for _ in range(num_destinations)
        ]
        self.live_sources = [s[f.live] for s, f in zip(self.sources, self.fields, strict=True)]
        live = [[d[f.live] for d, f in zip(dsts, self.fields, strict=True)] for dsts in self.sets]
        self.flat_dsts = [d for dsts in live for d in dsts]
        self.flat_sources = self.live_sources * num_destinations
        self.plan = sgl_kernel.FusedMetadataCopyPlan(
            [
                sgl_kernel.CopyRegion(s, dsts)
                for s, dsts in zip(self.live_sources, zip(*live, strict=True), strict=True)
            ]
        )

    @property
    def bytes_moved(self) -> int:
        """Each source read once, each destination written once."""
        return (1 + len(self.sets)) * sum(s.numel() * 4 for s in self.live_sources)

    def run_plan(self) -> None:
        self.plan.run()

    def run_copies(self) -> None:
        for dst, src in zip(self.flat_dsts, self.flat_sources, strict=True):
            dst.copy_(src)

    def run_foreach(self) -> None:
        torch._foreach_copy_(self.flat_dsts, self.flat_sources)

    def sglang_single(self) -> Run:
        source, dst = self._positional(self.sources, True), self._positional(self.sets[0], True)
        integers = (0, self.bs, self.cols, self.cols, self.bs)
        return lambda: sgl_kernel.fused_metadata_copy_cuda(*source, *dst, *integers)

    def sglang_multi(self) -> Run:
        sets = [tensor for s in (self.sources, *self.sets[:3]) for tensor in self._positional(s, False)]
        return lambda: sgl_kernel.fused_metadata_copy_multi_cuda(*sets, self.bs, self.cols, self.bs)

    def _positional(self, tensors: list[torch.Tensor], with_expanded: bool) -> list[torch.Tensor | None]:
        ordered: list[torch.Tensor | None] = [
            *tensors,
            None,
            None,
        ]  # num_splits and flashmla_metadata are absent
        if with_expanded:
            ordered.insert(4, None)
        return ordered

    def check(self, run: Run, name: str) -> None:
        for dst in self.flat_dsts:
            dst.fill_(-1)
        run()
        for dst, src in zip(self.flat_dsts, self.flat_sources, strict=True):
            if not torch.equal(dst, src):
                sys.exit(f"{name}: WRONG RESULT")


class GenerateSets:
    """Inputs of one DECODE step and N destinations, as `step` layout gives them: offsets 1 .. N."""

    def __init__(self, device: str, bs: int, cols: int, num_destinations: int) -> None:
        self.bs, self.cols = bs, cols
        width = 2 * cols
        generator = torch.Generator().manual_seed(0)
        self.req_to_token = torch.randint(
            0, 2**31 - 1, (2 * bs, width), generator=generator, dtype=torch.int32
        ).to(device)
        self.seq_lens = torch.full((bs,), cols - num_destinations, dtype=torch.int32, device=device)
        self.req_pool_indices = torch.randperm(2 * bs, generator=generator)[:bs].to(device)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        rows = 2 * bs
        self.destinations = [
            sgl_kernel.MetadataDestination(
                zeros(rows),
                zeros(rows + 1),
                zeros(rows, width),
                zeros(rows),
                zeros(rows + 1),
                None,
                zeros(rows, width // PAGE_SIZE),
                seqlens_offset=step + 1,
            )
            for step in range(num_destinations)
        ]
        self.plan = sgl_kernel.NSAMetadataGeneratePlan(
            mode=0,
            bs=bs,
            seq_lens=self.seq_lens,
            req_pool_indices=self.req_pool_indices,
            req_to_token=self.req_to_token,
            destinations=self.destinations,
            page_size=PAGE_SIZE,
            topk=TOPK,
        )

    @property
    def bytes_moved(self) -> int:
        """The live tokens read once; each destination's tables and vectors written once."""
        tables = self.bs * (self.cols + self.cols // PAGE_SIZE) * 4
        return self.bs * self.cols * 4 + len(self.destinations) * (tables + 4 * (self.bs * 4 + 2))

    def check(self) -> None:
        self.plan.run()
        tokens = self.req_to_token[self.req_pool_indices.long()]
        for dst in self.destinations:
            lens = self.seq_lens + dst.seqlens_offset
            live = int(lens[0])
            pages = -(-live // PAGE_SIZE)
            sparse = lens.clamp(max=TOPK)
            pairs = [
                (dst.cache_seqlens[: self.bs], lens),
                (dst.cu_seqlens_k[1 : self.bs + 1], lens.cumsum(0)),
                (dst.nsa_cache_seqlens[: self.bs], sparse),
                (dst.nsa_cu_seqlens_k[1 : self.bs + 1], sparse.cumsum(0)),
                (dst.page_table_1[: self.bs, :live], tokens[:, :live]),
                (dst.real_page_table[: self.bs, :pages], tokens[:, :live:PAGE_SIZE] // PAGE_SIZE),
            ]
            if not all(torch.equal(found, expected.int()) for found, expected in pairs):
                sys.exit("nsa_metadata_generate: WRONG RESULT")
