"""The metadata of NSA attention: what it holds, and the one table that describes it.

Everything that allocates, copies, generates, checks or benchmarks metadata walks `FIELDS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from operator import attrgetter

import torch

from .schedules import NO_STATE, Prepare, ReaderState


class MetadataMode(IntEnum):
    """The forward modes that replay a graph; the numbers are those of the kernels."""

    DECODE = 0
    TARGET_VERIFY = 1
    DRAFT_EXTEND = 2


class Extent(Enum):
    """The live part of a field, for bs requests, E expanded rows and rows of `len` visible keys."""

    REQS = "[bs]"
    REQS_PREFIX = "[bs + 1]"
    ROWS = "[E]"
    ROWS_PREFIX = "[E + 1]"
    TABLE = "[E, len]"
    PAGED_TABLE = "[E, ceil(len / page_size)]"
    FIXED = "as it is"  # fixed at capture: does not depend on lengths


@dataclass(frozen=True)
class MetadataField:
    """One line of the table: a field's name on each side, its live extent and the modes that carry it."""

    precomputed: str
    backend: str
    extent: Extent
    modes: frozenset[MetadataMode] = frozenset(MetadataMode)

    def of(self, holder: PrecomputedMetadata | NSAMetadata) -> torch.Tensor | None:
        """The field's tensor in a holder of either kind; None where the holder does without it."""
        path = self.precomputed if isinstance(holder, PrecomputedMetadata) else self.backend
        owner, _, _ = path.rpartition(".")
        if owner and getattr(holder, owner) is None:
            return None
        return attrgetter(path)(holder)

    @property
    def is_table(self) -> bool:
        return self.extent in (Extent.TABLE, Extent.PAGED_TABLE)


_EXPANDED = frozenset({MetadataMode.TARGET_VERIFY, MetadataMode.DRAFT_EXTEND})

FIELDS: tuple[MetadataField, ...] = (
    MetadataField("cache_seqlens", "cache_seqlens_int32", Extent.REQS),
    MetadataField("cu_seqlens_k", "cu_seqlens_k", Extent.REQS_PREFIX),
    MetadataField("page_indices", "page_table_1", Extent.TABLE),
    # In DECODE the rows are the requests and the backend's field is cache_seqlens_int32 itself.
    MetadataField("seqlens_expanded", "nsa_seqlens_expanded", Extent.ROWS, _EXPANDED),
    MetadataField("nsa_cache_seqlens", "nsa_cache_seqlens_int32", Extent.ROWS),
    MetadataField("nsa_cu_seqlens_k", "nsa_cu_seqlens_k", Extent.ROWS_PREFIX),
    MetadataField("real_page_table", "real_page_table", Extent.PAGED_TABLE),
    MetadataField("flashmla_metadata.flashmla_metadata", "flashmla_metadata.flashmla_metadata", Extent.FIXED),
    MetadataField("flashmla_metadata.num_splits", "flashmla_metadata.num_splits", Extent.FIXED),
)


def fields_of(mode: MetadataMode) -> Iterator[MetadataField]:
    """The fields that a mode carries."""
    return (field for field in FIELDS if mode in field.modes)


@dataclass(frozen=True)
class NSAFlashMLAMetadata:
    """FlashMLA's tile schedule. In sparse mode every row counts as topk, so it is fixed at capture."""

    flashmla_metadata: torch.Tensor  # [parts, 8], int32
    num_splits: torch.Tensor  # [E + 1], int32

    def clone(self) -> NSAFlashMLAMetadata:
        return NSAFlashMLAMetadata(self.flashmla_metadata.clone(), self.num_splits.clone())


@dataclass(frozen=True)
class MetadataShape:
    """The sizes from which every extent follows."""

    mode: MetadataMode
    bs: int
    rows_per_req: int  # 1 in DECODE, D in TARGET_VERIFY; the most rows a request has in DRAFT_EXTEND
    width: int  # columns of page_table_1: the longest sequence that it can hold
    page_size: int
    topk: int

    @property
    def rows(self) -> int:
        return self.bs * self.rows_per_req

    @property
    def paged_width(self) -> int:
        return -(-self.width // self.page_size)


@dataclass(frozen=True)
class PrecomputedMetadata:
    """The metadata of one step, computed once for all backends. All int32."""

    shape: MetadataShape
    cache_seqlens: torch.Tensor  # [bs]
    cu_seqlens_k: torch.Tensor  # [bs + 1]
    page_indices: torch.Tensor  # [E, max_len]
    seqlens_expanded: torch.Tensor  # [E]; DECODE: cache_seqlens
    nsa_cache_seqlens: torch.Tensor  # [E]
    nsa_cu_seqlens_k: torch.Tensor  # [E + 1]
    real_page_table: torch.Tensor | None  # [E, ceil(max_len / page_size)]; None where page_size is 1
    flashmla_metadata: NSAFlashMLAMetadata | None = None


@dataclass(frozen=True)
class NSAMetadata:
    """What one backend reads in one captured graph: views of buffers that the graph owns. All int32."""

    shape: MetadataShape
    cache_seqlens_int32: torch.Tensor  # [bs]
    cu_seqlens_k: torch.Tensor  # [bs + 1]
    page_table_1: torch.Tensor  # [E, width]: slot of every position
    nsa_seqlens_expanded: torch.Tensor  # [E]: keys visible to each row; DECODE: cache_seqlens_int32
    nsa_cache_seqlens_int32: torch.Tensor  # [E]: of these, keys that are attended to
    nsa_cu_seqlens_k: torch.Tensor  # [E + 1]
    real_page_table: torch.Tensor | None  # [E, paged_width]; None where page_size is 1
    flashmla_metadata: NSAFlashMLAMetadata | None = None
    reader: ReaderState = NO_STATE

    def prepared(self, prepare: Prepare | None) -> NSAMetadata:
        """The same tensors with what their reader needs beside them."""
        if prepare is None:
            return self
        reader = prepare(self)
        return replace(self, flashmla_metadata=reader.flashmla_metadata, reader=reader)

    def refresh_schedules(self) -> None:
        for schedule in self.reader.schedules:
            schedule.refresh(self)


@dataclass(frozen=True)
class MetadataBuffers:
    """The memory behind the NSAMetadata of one backend, for every captured batch size up to shape.bs."""

    shape: MetadataShape
    lengths: torch.Tensor  # int32, flat: cache_seqlens | cu_seqlens_k | expanded | nsa lens | nsa_cu
    page_table_1: torch.Tensor  # [E, width], int32
    real_page_table: torch.Tensor | None  # [E, paged_width], int32

    @classmethod
    def create(cls, shape: MetadataShape, device: torch.device) -> MetadataBuffers:
        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        tables = (
            zeros(shape.rows, shape.width),
            (zeros(shape.rows, shape.paged_width) if shape.page_size > 1 else None),
        )
        return cls(shape, zeros(sum(cls._length_sizes(shape))), *tables)

    def with_own_lengths(self) -> MetadataBuffers:
        """The same page tables under another set of length vectors."""
        return MetadataBuffers(
            self.shape, torch.zeros_like(self.lengths), self.page_table_1, self.real_page_table
        )

    @staticmethod
    def _length_sizes(shape: MetadataShape) -> tuple[int, ...]:
        # Every vector starts at a multiple of 4 elements, so that kernels can move 16 bytes at a time.
        bs, rows = shape.bs, shape.rows
        sizes = (bs, bs + 1, rows if shape.mode is not MetadataMode.DECODE else 0, rows, rows + 1)
        return tuple(-(-size // 4) * 4 for size in sizes)

    def view(self, bs: int) -> NSAMetadata:
        """The metadata of a captured batch of bs <= shape.bs requests."""
        shape = MetadataShape(
            self.shape.mode,
            bs,
            self.shape.rows_per_req,
            self.shape.width,
            self.shape.page_size,
            self.shape.topk,
        )
        seqlens, cu, expanded, nsa, nsa_cu = self.lengths.split(self._length_sizes(self.shape))
        rows = shape.rows
        return NSAMetadata(
            shape=shape,
            cache_seqlens_int32=seqlens[:bs],
            cu_seqlens_k=cu[: bs + 1],
            page_table_1=self.page_table_1[:rows],
            nsa_seqlens_expanded=seqlens[:bs] if shape.mode is MetadataMode.DECODE else expanded[:rows],
            nsa_cache_seqlens_int32=nsa[:rows],
            nsa_cu_seqlens_k=nsa_cu[: rows + 1],
            real_page_table=None if self.real_page_table is None else self.real_page_table[:rows],
        )

    @property
    def table_bytes(self) -> int:
        paged = 0 if self.real_page_table is None else self.real_page_table.numel()
        return 4 * (self.page_table_1.numel() + paged)


def as_precomputed(metadata: NSAMetadata) -> PrecomputedMetadata:
    """The same tensors under their precomputed names: a staging set is a backend's set nobody reads."""
    values = {field.precomputed: field.of(metadata) for field in FIELDS if field.extent is not Extent.FIXED}
    return PrecomputedMetadata(metadata.shape, flashmla_metadata=metadata.flashmla_metadata, **values)


def as_backend_metadata(computed: PrecomputedMetadata) -> NSAMetadata:
    """The same tensors under a backend's names: what an eager pass reads."""
    values = {field.backend: field.of(computed) for field in FIELDS if field.extent is not Extent.FIXED}
    return NSAMetadata(computed.shape, flashmla_metadata=computed.flashmla_metadata, **values)


def poison_(metadata: NSAMetadata, value: int) -> None:
    """Fills every element of every field with `value`: what no replay writes shows."""
    for field in FIELDS:
        tensor = field.of(metadata)
        if tensor is not None and field.extent is not Extent.FIXED:
            tensor.fill_(value)
