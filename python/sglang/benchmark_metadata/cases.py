"""What is measured: the grids, the inputs of a case, and the bytes that a path has to move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch

from sglang.srt.layers.attention.nsa.metadata import FIELDS, MetadataMode, MetadataShape
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs
from sglang.srt.layers.attention.nsa.paths import MetadataSelection
from sglang.srt.layers.attention.registry import IMPLEMENTATIONS

from .measure import capture_graph

TOPK = 2048  # index_topk of DeepSeek-V3.2
DRAFT_TOKENS = 4  # rows of a request in the expanded modes
INPUT_SETS = 4  # rotated between calls
SECTOR_BYTES = 32  # the least that a GPU reads of its memory
SPREAD = 16  # a sequence is up to a 16th shorter than the longest of its batch
READS = IMPLEMENTATIONS["triton"].reads  # what layout indirect generates: what a server on a GPU reads


@dataclass(frozen=True)
class BenchCase:
    """One point of a grid."""

    mode: MetadataMode
    bs: int
    context: int  # the longest sequence in the batch
    backends: int  # N
    page_size: int = 64
    draft_seqlens: str = "committed"

    @property
    def rows_per_req(self) -> int:
        return 1 if self.mode is MetadataMode.DECODE else DRAFT_TOKENS

    @property
    def offsets(self) -> tuple[int, ...]:
        if self.mode is not MetadataMode.DECODE:
            return (0,) * self.backends
        return MetadataSelection(draft_seqlens=self.draft_seqlens).draft_offsets(self.backends)

    @property
    def max_len(self) -> int:
        """The bound of the row lengths that the host knows."""
        drafts = self.rows_per_req if self.mode is MetadataMode.TARGET_VERIFY else 0
        return self.context + max(drafts, *self.offsets)

    @property
    def shape(self) -> MetadataShape:
        width = -(-self.max_len // 64) * 64
        return MetadataShape(self.mode, self.bs, self.rows_per_req, width, self.page_size, TOPK)

    @property
    def table_bytes(self) -> int:
        """Page tables of one backend."""
        return self.shape.table_bytes

    @property
    def mean_len(self) -> int:
        """Of the rows: max_len, less what `BenchInputs` takes from all sequences of a batch but one."""
        return self.max_len - (self.context // SPREAD - 1) * (self.bs - 1) // (2 * self.bs)

    @property
    def set_bytes(self) -> int:
        """One set of metadata, every row up to max_len: what a copy moves, which knows no row's length."""
        return self._set_bytes(self.max_len)

    @property
    def live_set_bytes(self) -> int:
        """One set of metadata, every row up to its own length."""
        return self._set_bytes(self.mean_len)

    def _set_bytes(self, cols: int) -> int:
        paged = -(-cols // self.page_size) if self.page_size > 1 else 0
        return self.length_bytes + 4 * self.shape.rows * (cols + paged)

    @property
    def length_bytes(self) -> int:
        rows = self.shape.rows
        expanded = rows if self.mode is not MetadataMode.DECODE else 0
        return 4 * (2 * self.bs + 1 + expanded + 2 * rows + 1)

    def generate_bytes(self, by_page: bool) -> int:
        """One set written; of the request table every live column read once, or a sector of each page."""
        read = 4 * self.mean_len
        if by_page:
            read = min(read, -(-self.mean_len // self.page_size) * SECTOR_BYTES)
        return self.live_set_bytes + self.bs * read

    @property
    def indirect_bytes(self) -> int:
        """The lengths read, and for each different rule the vectors written that READS names."""
        extents = [field.extent for field in FIELDS if field.is_vector and field.backend in READS]
        written = sum(map(self.shape.length_of, extents))
        return 4 * (self.bs + len(set(self.offsets)) * written)


def _decode(bs: tuple[int, ...], contexts: tuple[int, ...], backends: tuple[int, ...]) -> list[BenchCase]:
    return [BenchCase(MetadataMode.DECODE, *point) for point in product(bs, contexts, backends)]


def _expanded(bs: tuple[int, ...], contexts: tuple[int, ...], backends: tuple[int, ...]) -> list[BenchCase]:
    modes = (MetadataMode.TARGET_VERIFY, MetadataMode.DRAFT_EXTEND)
    return [BenchCase(*point) for point in product(modes, bs, contexts, backends)]


K = 1024
GRIDS: dict[str, Callable[[], list[BenchCase]]] = {
    "one": lambda: _decode((32,), (16 * K,), (7,)),
    "quick": lambda: _decode((8,), (4 * K, 16 * K), (3, 7)),
    "full": lambda: _decode((1, 8, 32), (K, 16 * K), (3, 7)) + _expanded((8,), (16 * K,), (1, 3)),
    "h200": lambda: (
        _decode((1, 8, 32, 128), (K, 16 * K, 128 * K), (2, 3, 7, 15)) + _expanded((8, 32), (16 * K,), (1, 3))
    ),
}


class BenchInputs:
    """The static inputs of a captured batch, and several sets of values to load into them."""

    def __init__(self, case: BenchCase, device: torch.device) -> None:
        self.case = case
        shape = case.shape
        pool = case.bs + INPUT_SETS + 1
        generator = torch.Generator().manual_seed(case.bs * 31 + case.context)
        pages = torch.randint(1, 1 << 20, (pool, shape.width // 64), generator=generator, dtype=torch.int32)
        slots = pages[:, :, None] * 64 + torch.arange(64, dtype=torch.int32)
        self.req_to_token = slots.view(pool, shape.width).to(device)  # [pool, width], int32
        self.seq_lens = torch.ones(case.bs, dtype=torch.int32, device=device)
        self.req_pool_indices = torch.zeros(case.bs, dtype=torch.int32, device=device)
        self.accept_lens = torch.ones(case.bs, dtype=torch.int32, device=device)
        self.sets = [self._values(pool, generator, device) for _ in range(INPUT_SETS)]
        self._loads = [functools.partial(self._copy, values) for values in self.sets]
        if device.type == "cuda":
            self._loads = [capture_graph(load, device).replay for load in self._loads]

    def _values(
        self, pool: int, generator: torch.Generator, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [bs] each, int32
        case = self.case
        shorter = torch.randint(0, case.context // SPREAD, (case.bs,), generator=generator)
        shorter[torch.randint(0, case.bs, (1,), generator=generator)] = 0
        requests = 1 + torch.randperm(pool - 1, generator=generator)[: case.bs]
        accept = torch.randint(1, DRAFT_TOKENS + 1, (case.bs,), generator=generator)
        return tuple(v.to(torch.int32).to(device) for v in (case.context - shorter, requests, accept))

    def load(self, index: int) -> None:
        """Another set of lengths and requests into the same buffers. On CUDA a graph's replay, since what is
        timed next must not find its own code warm: one of the lines is `copy_`."""
        self._loads[index % len(self._loads)]()

    def _copy(self, values: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        for target, source in zip((self.seq_lens, self.req_pool_indices, self.accept_lens), values):
            target.copy_(source)

    @property
    def metadata_inputs(self) -> MetadataInputs:
        extend = self.case.mode is MetadataMode.DRAFT_EXTEND
        return MetadataInputs(
            shape=self.case.shape,
            seq_lens=self.seq_lens,
            req_pool_indices=self.req_pool_indices,
            req_to_token=self.req_to_token,
            accept_lens=self.accept_lens if extend else None,
            whole_pages=True,
        )
