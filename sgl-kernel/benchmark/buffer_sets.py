"""Buffers for the benchmark: of a copy with its N destinations, and of a generation with its N."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import sgl_kernel
import torch

PAGE_SIZE, TOPK = 64, 2048
SECTOR_BYTES = 32  # the least that a GPU reads of its memory

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


def random_int32(shape: tuple[int, ...], device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(0, 2**31 - 1, shape, generator=generator, dtype=torch.int32, device=device)


class CopySets:
    """One source set and N backends' buffers, with the same copy written in every way that is compared."""

    def __init__(self, device: str, bs: int, cols: int, num_destinations: int) -> None:
        self.bs, self.cols, self.fields = bs, cols, decode_fields(bs, cols)
        self.sources = [random_int32(field.shape, device) for field in self.fields]
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

    def run(self) -> None:
        self.plan.run()

    def run_copies(self) -> None:
        for dst, src in zip(self.flat_dsts, self.flat_sources, strict=True):
            dst.copy_(src)

    def run_foreach(self) -> None:
        torch._foreach_copy_(self.flat_dsts, self.flat_sources)

    @cached_property
    def run_single(self) -> Run:
        """SGLang's call for one backend."""
        source, dst = self._positional(self.sources, True), self._positional(self.sets[0], True)
        integers = (0, self.bs, self.cols, self.cols, self.bs)
        return lambda: sgl_kernel.fused_metadata_copy_cuda(*source, *dst, *integers)

    @cached_property
    def run_multi(self) -> Run:
        """SGLang's call for three backends."""
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


def whole_pages_of_slots(rows: int, width: int, device: str) -> torch.Tensor:  # [rows, width], int32
    """A request table as a paged allocator fills it."""
    pages = random_int32((rows, -(-width // PAGE_SIZE)), device) // PAGE_SIZE
    slots = pages[:, :, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, dtype=torch.int32, device=device)
    return slots.view(rows, -1)[:, :width].contiguous()


class MemcpySets:
    """One contiguous copy_, in a graph a memcpy node, that moves as many bytes as another case."""

    def __init__(self, device: str, bytes_moved: int) -> None:
        self.bytes_moved = bytes_moved  # half read, half written
        self.src, self.dst = (random_int32((bytes_moved // 8,), device) for _ in range(2))

    def run(self) -> None:
        self.dst.copy_(self.src)


class GenerateSets:
    """Inputs of one DECODE step and N destinations, as draft lengths `step` give them: offsets 1 .. N.

    tables: each destination's own, one shared by all, or none.
    whole_pages: the plan is told that requests hold whole pages, which they do either way.
    """

    def __init__(
        self,
        device: str,
        bs: int,
        cols: int,
        num_destinations: int,
        tables: Literal["own", "shared", "none"] = "own",
        whole_pages: bool = True,
    ) -> None:
        self.bs, self.cols, self.tables, self.whole_pages = bs, cols, tables, whole_pages
        width = 2 * cols
        self.req_to_token = whole_pages_of_slots(2 * bs, width, device)
        self.seq_lens = torch.full((bs,), cols - num_destinations, dtype=torch.int32, device=device)
        self.req_pool_indices = torch.randperm(2 * bs, generator=torch.Generator().manual_seed(0))[:bs].to(
            device
        )

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        rows = 2 * bs
        self.num_tables = {"own": num_destinations, "shared": 1, "none": 0}[tables]
        pairs = [(zeros(rows, width), zeros(rows, width // PAGE_SIZE)) for _ in range(self.num_tables)]
        self.destinations = []
        for step in range(num_destinations):
            page_table_1, real_page_table = pairs[step % self.num_tables] if pairs else (None, None)
            self.destinations.append(
                sgl_kernel.MetadataDestination(
                    cache_seqlens=zeros(rows),
                    cu_seqlens_k=zeros(rows + 1),
                    page_table_1=page_table_1,
                    nsa_cache_seqlens=zeros(rows),
                    nsa_cu_seqlens_k=zeros(rows + 1),
                    real_page_table=real_page_table,
                    seqlens_offset=step + 1,
                )
            )
        self.plan = sgl_kernel.NSAMetadataGeneratePlan(
            mode=0,
            bs=bs,
            seq_lens=self.seq_lens,
            req_pool_indices=self.req_pool_indices,
            req_to_token=self.req_to_token,
            destinations=self.destinations,
            page_size=PAGE_SIZE,
            topk=TOPK,
            whole_pages=whole_pages,
        )

    def run(self) -> None:
        """Before a graph: the host has a bound of the lengths."""
        self.plan.run(self.cols)

    def run_in_graph(self) -> None:
        """As a captured launch must be: for any lengths that the tables hold."""
        self.plan.run()

    @property
    def bytes_moved(self) -> int:
        """What is read, once; every table and all vectors, written once."""
        sector = SECTOR_BYTES if self.whole_pages else 4 * PAGE_SIZE  # of each page
        return self._bytes(self.bs * min(-(-self.cols // PAGE_SIZE) * sector, 4 * self.cols))

    @property
    def bytes_by_column(self) -> int:
        """The same, if the slot of every live column were read."""
        return self._bytes(self.bs * self.cols * 4)

    def _bytes(self, read: int) -> int:
        tokens, pages = (self.bs * self.cols // per * 4 for per in (1, PAGE_SIZE))
        tables = read + self.num_tables * (tokens + pages) if self.num_tables else 0
        return tables + len(self.destinations) * 4 * (self.bs * 4 + 2)

    def check(self, method: str = "run") -> None:
        getattr(self, method)()
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
            ]
            if dst.page_table_1 is not None:
                pairs += [
                    (dst.page_table_1[: self.bs, :live], tokens[:, :live]),
                    (dst.real_page_table[: self.bs, :pages], tokens[:, :live:PAGE_SIZE] // PAGE_SIZE),
                ]
            if not all(torch.equal(found, expected.int()) for found, expected in pairs):
                sys.exit("nsa_metadata_generate: WRONG RESULT")


class ReplicateSets:
    """A generation into a staging set and one copy out of it into N backends' buffers: two launches."""

    def __init__(
        self, device: str, bs: int, cols: int, num_destinations: int, whole_pages: bool = True
    ) -> None:
        self.generate = GenerateSets(device, bs, cols, 1, whole_pages=whole_pages)
        staging, fields = self.generate.destinations[0], decode_fields(bs, cols)
        tensors = [t for t in staging.tensors() if t is not None]  # in the order of the fields
        self.live_sources = [t[f.live] for t, f in zip(tensors, fields, strict=True)]
        self.dsts = [
            [
                torch.zeros(f.capacity, dtype=torch.int32, device=device)[f.live]
                for _ in range(num_destinations)
            ]
            for f in fields
        ]
        self.copy = sgl_kernel.FusedMetadataCopyPlan(
            [sgl_kernel.CopyRegion(s, tuple(d)) for s, d in zip(self.live_sources, self.dsts, strict=True)]
        )
        self.replay = sgl_kernel.bind_generate_and_copy(self.generate.plan, self.copy)

    def run(self) -> None:
        self.replay(self.generate.cols)

    @property
    def bytes_moved(self) -> int:
        """The generation's, then the staging set read once and each destination written once."""
        return self.generate.bytes_moved + self._copy_bytes

    @property
    def bytes_by_column(self) -> int:
        return self.generate.bytes_by_column + self._copy_bytes

    @property
    def _copy_bytes(self) -> int:
        return (1 + len(self.dsts[0])) * sum(s.numel() * 4 for s in self.live_sources)

    def check(self, method: str = "run") -> None:
        getattr(self, method)()
        self.generate.check()
        for src, dsts in zip(self.live_sources, self.dsts, strict=True):
            if not all(torch.equal(src, dst) for dst in dsts):
                sys.exit("replicate: WRONG RESULT")
