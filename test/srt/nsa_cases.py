"""Batches for the metadata tests, and the metadata they must have, written down in plain Python loops."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from sglang.benchmark_metadata.competitors import COMPETITORS, methods_of
from sglang.srt.layers.attention.nsa.metadata import (
    ALL_FIELDS,
    TABLE_FIELDS,
    Extent,
    MetadataMode,
    MetadataShape,
    NSAMetadata,
    PrecomputedMetadata,
    fields_of,
    poison_,
)
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs
from sglang.srt.layers.attention.nsa.paths import GraphMetadata, MetadataMethods, MetadataSelection
from sglang.srt.layers.attention.nsa.schedules import Prepare

POISON = -0x5A5A5A5B
MODES = tuple(MetadataMode)
EXPANDED = (MetadataMode.TARGET_VERIFY, MetadataMode.DRAFT_EXTEND)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")],
    ),
]


@dataclass(frozen=True)
class MetadataCase:
    """One shape of metadata and of the inputs that it is computed from."""

    mode: MetadataMode = MetadataMode.DECODE
    max_bs: int = 8
    backends: int = 3
    page_size: int = 64
    rows_per_req: int = 4  # of the expanded modes
    draft_seqlens: str = "committed"
    dtype: torch.dtype = torch.int32
    width: int = 192
    topk: int = 48
    pool: int = 20
    whole_pages: bool = False  # of slots, and the inputs say so

    @property
    def shape(self) -> MetadataShape:
        rows = 1 if self.mode is MetadataMode.DECODE else self.rows_per_req
        return MetadataShape(self.mode, self.max_bs, rows, self.width, self.page_size, self.topk)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Only draft steps count differently; the expanded modes have one offset."""
        if self.mode is not MetadataMode.DECODE:
            return (0,) * self.backends
        return MetadataSelection(draft_seqlens=self.draft_seqlens).draft_offsets(self.backends)

    @property
    def longest(self) -> int:
        """The longest sequence length that fits with everything that is added to it."""
        return self.width - max((self.shape.rows_per_req, *self.offsets))


@dataclass(frozen=True)
class Batch:
    """What one replay finds in the static inputs, as Python lists."""

    seq_lens: tuple[int, ...]
    requests: tuple[int, ...]
    accept_lens: tuple[int, ...]

    @property
    def bs(self) -> int:
        return len(self.seq_lens)

    def padded(self, bs: int) -> Batch:
        """With the runner's padding: request 0, length 1, nothing accepted."""
        n = bs - self.bs
        return Batch(self.seq_lens + (1,) * n, self.requests + (0,) * n, self.accept_lens + (0,) * n)


def random_batch(case: MetadataCase, bs: int, rng: random.Random) -> Batch:
    """Hostile lengths: the shortest, the longest, page and topk boundaries, and anything between."""
    corners = [1, case.topk - 1, case.topk, case.topk + 1, case.page_size, case.page_size + 1, case.longest]
    lens = [rng.choice(corners) if rng.random() < 0.4 else rng.randint(1, case.longest) for _ in range(bs)]
    lens = [min(length, case.longest) for length in lens]
    accept = [min(rng.randint(0, case.rows_per_req), length) for length in lens]
    requests = rng.sample(range(1, case.pool), bs) if bs < case.pool else []
    return Batch(tuple(lens), tuple(requests), tuple(accept))


class StaticInputs:
    """The buffers that a captured graph reads: everything that no batch has loaded is poison."""

    def __init__(self, case: MetadataCase, device: str = "cpu", seed: int = 0) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(seed)
        page = case.page_size if case.whole_pages else 1
        first = torch.randint(0, (1 << 30) // page, (case.pool, case.width // page, 1), generator=generator)
        slots = (first * page + torch.arange(page)).view(case.pool, case.width).int()
        self.table: list[list[int]] = slots.tolist()
        self.req_to_token = slots.to(device)
        self.seq_lens = torch.full((case.max_bs,), POISON, dtype=case.dtype, device=device)
        self.requests = torch.zeros(case.max_bs, dtype=case.dtype, device=device)
        self.accept_lens = torch.full((case.max_bs,), POISON, dtype=torch.int32, device=device)

    def view(self, bs: int) -> MetadataInputs:
        extend = self.case.mode is MetadataMode.DRAFT_EXTEND
        return MetadataInputs(
            shape=replace(self.case.shape, bs=bs),
            seq_lens=self.seq_lens[:bs],
            req_pool_indices=self.requests[:bs],
            req_to_token=self.req_to_token,
            accept_lens=self.accept_lens[:bs] if extend else None,
            whole_pages=self.case.whole_pages,
        )

    def load(self, batch: Batch) -> None:
        for buffer, values in (
            (self.seq_lens, batch.seq_lens),
            (self.requests, batch.requests),
            (self.accept_lens, batch.accept_lens),
        ):
            buffer[: batch.bs] = torch.tensor(values, dtype=buffer.dtype)

    def max_len(self, batch: Batch) -> int:
        """The bound that the host would give: of every row, in every backend."""
        return max(batch.seq_lens, default=0) + max((self.case.shape.rows_per_req, *self.case.offsets))


def graph_metadata(
    case: MetadataCase,
    inputs: StaticInputs,
    layout: str = "replicate",
    copy: str = "fused",
    batch_sizes: Sequence[int] | None = None,
    methods: MetadataMethods | None = None,
    check: bool = False,
    prepare: Prepare | None = None,
    reads: frozenset[str] = ALL_FIELDS,
) -> GraphMetadata:
    """A planned path over `inputs`; layout 'recompute' is the flag switched off. `copy` may be a competitor
    of the benchmark's."""
    enabled = layout != "recompute"
    if copy in COMPETITORS:
        methods, copy = methods_of(copy), "auto"
    selection = MetadataSelection(
        enabled, layout if enabled else "replicate", copy, case.draft_seqlens, check_replays=check
    )
    graph = GraphMetadata(
        selection, case.shape, case.offsets, torch.device(inputs.device), methods, prepare, reads
    )
    for bs in batch_sizes or (case.max_bs,):
        graph.capture(inputs.view(bs))
    return graph


def poison_all(graph: GraphMetadata) -> None:
    """Every element of every set of buffers, those of staging included."""
    for buffers in (*graph.buffers, *graph.staging):
        buffers.lengths.fill_(POISON)
        poison_(buffers.view(buffers.shape.bs), POISON)


def wrap_run(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    wrap: Callable[[Callable[[int], None]], Callable[[int], None]],
) -> None:
    """Every `owner` made from now on runs what `wrap` makes of its run."""
    original = owner.__init__

    def init(self: Any, *args: Any) -> None:
        original(self, *args)
        self.run = wrap(self.run)

    monkeypatch.setattr(owner, "__init__", init)


def replay(graph: GraphMetadata, bs: int, max_len: int) -> None:
    """What the graph runner does around one replay."""
    graph.replay(bs, max_len)
    graph.run_in_graph(bs)


# ---- the reference: nothing but loops over numbers


def reference_rows(mode: MetadataMode, rows_per_req: int, batch: Batch, offset: int) -> list[tuple[int, int]]:
    """(request index, visible keys) of every row."""
    rows = []
    for seq_len, request, accepted in zip(batch.seq_lens, batch.requests, batch.accept_lens):
        length = max(0, seq_len + offset)
        if mode is MetadataMode.DECODE:
            rows.append((request, length))
        elif mode is MetadataMode.TARGET_VERIFY:
            rows += [(request, length + i + 1) for i in range(rows_per_req)]
        else:
            for i in range(rows_per_req):
                rows.append((request, max(0, length - accepted + 1 + i) if i < accepted else 0))
    return rows


def reference_metadata(
    case: MetadataCase,
    table: list[list[int]],
    batch: Batch,
    offset: int = 0,
) -> dict[str, list]:
    """Precomputed field -> its live elements: a list of numbers, or of rows of their own lengths."""
    rows = reference_rows(case.mode, case.rows_per_req, batch, offset)
    drafts = case.rows_per_req if case.mode is MetadataMode.TARGET_VERIFY else 0
    cache_seqlens = [max(0, length + offset) + drafts for length in batch.seq_lens]
    expanded = [length for _, length in rows]
    attended = [min(length, case.topk) for length in expanded]
    expected: dict[str, list] = {
        "cache_seqlens": cache_seqlens,
        "cu_seqlens_k": prefix_sums(cache_seqlens),
        "page_indices": [table[request][:length] for request, length in rows],
        "seqlens_expanded": expanded,
        "nsa_cache_seqlens": attended,
        "nsa_cu_seqlens_k": prefix_sums(attended),
    }
    if case.page_size > 1:
        expected["real_page_table"] = [
            [table[request][at] // case.page_size for at in range(0, length, case.page_size)]
            for request, length in rows
        ]
    return expected


def prefix_sums(numbers: list[int]) -> list[int]:
    sums = [0]
    for number in numbers:
        sums.append(sums[-1] + number)
    return sums


def assert_live_equal(expected: dict[str, list], holder: PrecomputedMetadata | NSAMetadata) -> None:
    """Every live element of every field that the mode carries; where requests stand in for the page tables,
    these are not there."""
    indirect = isinstance(holder, NSAMetadata) and holder.requests is not None
    for field in fields_of(holder.shape.mode):
        if field.extent is Extent.FIXED:
            continue
        tensor = field.of(holder)
        if field.precomputed not in expected or (indirect and field.backend in TABLE_FIELDS):
            assert tensor is None, f"{field.precomputed} must be absent"
            continue
        assert tensor.dtype == torch.int32, field.precomputed
        want = expected[field.precomputed]
        have = tensor[: len(want)].tolist()
        if field.is_table:
            have = [row[: len(live)] for row, live in zip(have, want)]
        assert have == want, f"{field.precomputed} / {field.backend}"
