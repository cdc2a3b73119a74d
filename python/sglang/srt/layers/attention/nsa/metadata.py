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
    """One line of the table: a field's name on each side, its live extent, its readers, its modes."""

    precomputed: str
    backend: str
    extent: Extent
    sglang_reads: str  # who reads it there; our own readers declare theirs in attention/registry.py
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

    @property
    def is_vector(self) -> bool:
        return not self.is_table and self.extent is not Extent.FIXED


_EXPANDED = frozenset({MetadataMode.TARGET_VERIFY, MetadataMode.DRAFT_EXTEND})

# The layouts with page tables keep all of it, though our own readers want two or three fields: the plugin
# needs the same for SGLang's. Layout `indirect` holds and generates what the chosen readers declare, no more.
FIELDS: tuple[MetadataField, ...] = (
    MetadataField(
        "cache_seqlens",
        "cache_seqlens_int32",
        Extent.REQS,
        "DeepGEMM's scores and their schedule in DECODE; trtllm",
    ),
    MetadataField("cu_seqlens_k", "cu_seqlens_k", Extent.REQS_PREFIX, "dense attention in prefill"),
    MetadataField("page_indices", "page_table_1", Extent.TABLE, "top-k's translation to slots"),
    # In DECODE the rows are the requests and the backend's field is cache_seqlens_int32 itself.
    MetadataField(
        "seqlens_expanded",
        "nsa_seqlens_expanded",
        Extent.ROWS,
        "top-k; DeepGEMM's scores and their schedule",
        _EXPANDED,
    ),
    MetadataField("nsa_cache_seqlens", "nsa_cache_seqlens_int32", Extent.ROWS, "fa3, flashmla_kv"),
    MetadataField("nsa_cu_seqlens_k", "nsa_cu_seqlens_k", Extent.ROWS_PREFIX, "fa3"),
    MetadataField("real_page_table", "real_page_table", Extent.PAGED_TABLE, "DeepGEMM's scores"),
    MetadataField(
        "flashmla_metadata.flashmla_metadata",
        "flashmla_metadata.flashmla_metadata",
        Extent.FIXED,
        "flashmla_kv",
    ),
    MetadataField(
        "flashmla_metadata.num_splits", "flashmla_metadata.num_splits", Extent.FIXED, "flashmla_kv"
    ),
)
ALL_FIELDS = frozenset(field.backend for field in FIELDS)
TABLE_FIELDS = frozenset(field.backend for field in FIELDS if field.is_table)


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

    @property
    def table_bytes(self) -> int:
        """One set of page tables."""
        return 4 * self.rows * (self.width + (self.paged_width if self.page_size > 1 else 0))

    def length_of(self, extent: Extent) -> int:
        """Elements of a vector."""
        return {
            Extent.REQS: self.bs,
            Extent.REQS_PREFIX: self.bs + 1,
            Extent.ROWS: self.rows,
            Extent.ROWS_PREFIX: self.rows + 1,
        }[extent]


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
class SlotTable:
    """Where readers find the slots of each row's positions: `slots[r]`, where r is `rows[t // rows_per_req]`
    for row t, or `rows[t]` where rows_per_req is None, or t itself where there are no `rows`."""

    slots: torch.Tensor  # [R, W], int32: a page_table_1, or req_to_token itself
    rows: torch.Tensor | None = None  # int32 or int64: requests; without rows_per_req in runs of equal ones
    rows_per_req: int | None = None


@dataclass(frozen=True)
class NSAMetadata:
    """What one backend reads in one captured graph: views of buffers that the graph owns. All int32.

    Without page tables a field that no reader declares is None, and `requests` stands in for page_table_1.
    """

    shape: MetadataShape
    cache_seqlens_int32: torch.Tensor | None = None  # [bs]
    cu_seqlens_k: torch.Tensor | None = None  # [bs + 1]
    page_table_1: torch.Tensor | None = None  # [E, width]: slot of every position
    nsa_seqlens_expanded: torch.Tensor | None = None  # [E]: keys a row sees; DECODE: cache_seqlens_int32
    nsa_cache_seqlens_int32: torch.Tensor | None = None  # [E]: of these, keys that are attended to
    nsa_cu_seqlens_k: torch.Tensor | None = None  # [E + 1]
    real_page_table: torch.Tensor | None = None  # [E, paged_width]; None where page_size is 1
    flashmla_metadata: NSAFlashMLAMetadata | None = None
    requests: SlotTable | None = None  # req_to_token and the request of each row
    reader: ReaderState = NO_STATE

    @property
    def slot_table(self) -> SlotTable:
        return SlotTable(self.page_table_1) if self.requests is None else self.requests

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
    fields: frozenset[str]  # of the backend: those that are there
    lengths: torch.Tensor  # int32, flat: the vectors of FIELDS, in its order
    page_table_1: torch.Tensor | None  # [E, width], int32
    real_page_table: torch.Tensor | None  # [E, paged_width], int32

    @classmethod
    def create(
        cls, shape: MetadataShape, device: torch.device, fields: frozenset[str] = ALL_FIELDS
    ) -> MetadataBuffers:
        """Zeroed memory for `fields` (names of the backend's), as far as the shape has them."""
        if shape.mode is MetadataMode.DECODE and "nsa_seqlens_expanded" in fields:
            fields |= {"cache_seqlens_int32"}  # they are one
        absent = set() if shape.page_size > 1 else {"real_page_table"}
        fields -= absent

        def table(name: str, width: int) -> torch.Tensor | None:
            size = (shape.rows, width)
            return torch.zeros(size, dtype=torch.int32, device=device) if name in fields else None

        flat = sum(_aligned(shape.length_of(field.extent)) for field in cls._vectors(shape, fields))
        return cls(
            shape=shape,
            fields=fields,
            lengths=torch.zeros(flat, dtype=torch.int32, device=device),
            page_table_1=table("page_table_1", shape.width),
            real_page_table=table("real_page_table", shape.paged_width),
        )

    @staticmethod
    def _vectors(shape: MetadataShape, fields: frozenset[str]) -> list[MetadataField]:
        return [f for f in fields_of(shape.mode) if f.is_vector and f.backend in fields]

    def with_own_lengths(self) -> MetadataBuffers:
        """The same page tables under another set of length vectors."""
        return replace(self, lengths=torch.zeros_like(self.lengths))

    def view(self, bs: int) -> NSAMetadata:
        """The metadata of a captured batch of bs <= shape.bs requests."""
        shape = replace(self.shape, bs=bs)
        vectors = self._vectors(shape, self.fields)
        parts = self.lengths.split([_aligned(self.shape.length_of(field.extent)) for field in vectors])
        values = {field.backend: part[: shape.length_of(field.extent)] for field, part in zip(vectors, parts)}
        if shape.mode is MetadataMode.DECODE:
            values["nsa_seqlens_expanded"] = values.get("cache_seqlens_int32")
        for name in ("page_table_1", "real_page_table"):
            table = getattr(self, name)
            values[name] = None if table is None else table[: shape.rows]
        return NSAMetadata(shape=shape, **values)

    @property
    def table_bytes(self) -> int:
        """Page tables that are held."""
        tables = (self.page_table_1, self.real_page_table)
        return sum(4 * table.numel() for table in tables if table is not None)


def _aligned(size: int) -> int:
    """Vectors start at multiples of 4 elements, so that kernels can move 16 bytes at a time."""
    return -(-size // 4) * 4


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
