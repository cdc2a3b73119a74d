"""Fused metadata copy and generation: plans built once, run every step; and SGLang's positional calls.

Every check is made in C++ when a plan is built or a function is called, in the order device, dtype, rank,
shape, stride, overlap; nothing is written when one fails. The error is a RuntimeError that reads
``<operator>: <field>: expected <...>, found <...>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ._library import operator
from ._plan import Plan


@dataclass(frozen=True)
class CopyRegion:
    """One source and the places that it is copied to. All tensors have one dtype (1, 2, 4 or 8 bytes) and
    one rank.

    src: 1-D [n] or 2-D [rows, cols], unit inner stride. Its shape is the full extent of the copy.
    dsts: tensors at least as large as `src` in each dimension, unit inner stride, any row stride.
    rows: "expanded": only the first `expanded_rows + rows_extra` rows (of a 1-D tensor: elements) of a run.
    rows_extra: see `rows`; 1 for a prefix sum, which has one element more than there are rows.
    cols_per: 0: all columns; p > 0: only the first ceil(max_len / p) columns of a run (2-D only).
    """

    src: torch.Tensor
    dsts: tuple[torch.Tensor, ...]
    rows: Literal["all", "expanded"] = "all"
    rows_extra: int = 0
    cols_per: int = 0


class FusedMetadataCopyPlan(Plan):
    """Copies regions to any number of destinations; up to 32 regions and 159 destinations are one launch.

    The plan holds addresses and keeps the memory behind them; storage must not be resized. No source may
    overlap a destination, nor one destination another (the same one twice is legal). A run enqueues on the
    current stream, allocates nothing, and can be captured in a CUDA graph, which does not own the plan.
    """

    def __init__(self, regions: Sequence[CopyRegion]) -> None:
        if not regions:
            raise RuntimeError("fused_metadata_copy: regions: expected at least one region, found 0")
        for i, region in enumerate(regions):
            if region.rows not in ("all", "expanded"):
                where = f"fused_metadata_copy: regions[{i}].rows"
                raise RuntimeError(f"{where}: expected 'all' or 'expanded', found {region.rows!r}")
        super().__init__(
            regions[0].src.device.type,
            "fused_metadata_copy",
            [r.src for r in regions],
            [dst for r in regions for dst in r.dsts],
            [len(r.dsts) for r in regions],
            [int(r.rows == "expanded") for r in regions],
            [r.rows_extra for r in regions],
            [r.cols_per for r in regions],
        )

    def run(self, expanded_rows: int = -1, max_len: int = -1) -> None:
        """Copies. -1 means the full extent; a value larger than some region's extent is an error."""
        self._enqueue(expanded_rows, max_len)


@dataclass(frozen=True)
class MetadataDestination:
    """The metadata tensors of one attention backend: int32, unit inner stride, on one device. Those that no
    reader of the backend wants stay None; at least one is given.

    `rows` is bs in DECODE and bs * rows_per_req in the other modes (packed rows may use fewer). The widths
    of the tables may differ between destinations. Destinations may share their tables: those are then
    written once, up to the longest of the lengths. Any other overlap is refused, but of equal vectors.
    """

    cache_seqlens: torch.Tensor | None = None  # [>= bs]
    cu_seqlens_k: torch.Tensor | None = None  # [>= bs + 1]
    page_table_1: torch.Tensor | None = None  # [>= rows, width1], width1 at most req_to_token's
    nsa_cache_seqlens: torch.Tensor | None = None  # [>= rows]
    nsa_cu_seqlens_k: torch.Tensor | None = None  # [>= rows + 1]
    seqlens_expanded: torch.Tensor | None = None  # [>= rows]
    # [>= rows, width2], width2 at most ceil(req_to_token's / page_size)
    real_page_table: torch.Tensor | None = None
    seqlens_offset: int = 0  # added to every seq_len (draft step i: i + 1); -2^24 .. 2^24

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the operator's fields."""
        return (
            self.cache_seqlens,
            self.cu_seqlens_k,
            self.page_table_1,
            self.nsa_cache_seqlens,
            self.nsa_cu_seqlens_k,
            self.seqlens_expanded,
            self.real_page_table,
        )


class NSAMetadataGeneratePlan(Plan):
    """Generates all metadata of all destinations from seq_lens, req_pool_indices and req_to_token, on the
    device.

    Up to 32 destinations are one launch. With L_i = max(seq_lens[i] + seqlens_offset, 0), where a seq_len
    above 2^30 counts as 2^30, row j of request i has length

    - mode 0, DECODE: one row, L_i; cache_seqlens[i] = L_i
    - mode 1, TARGET_VERIFY: rows_per_req rows, L_i + 1 + j; cache_seqlens[i] = L_i + rows_per_req
    - mode 2, DRAFT_EXTEND: q_i = accept_lens[i] clamped to [0, rows_per_req]; max(L_i - q_i + 1 + j, 0) for
      j < q_i, else 0; cache_seqlens[i] = L_i. Static layout: rows_per_req rows each. packed: q_i rows each,
      without gaps; rows at and past sum(q_i) are left alone.

    nsa_cache_seqlens = min(length, topk); cu_seqlens_k and nsa_cu_seqlens_k are prefix sums that begin with
    0; seqlens_expanded = length. Tables get their live columns only: page_table_1[r, c] =
    req_to_token[request, c] for c < length, real_page_table[r, c] = req_to_token[request, c * page_size] //
    page_size for c * page_size < length.

    A pool index outside of req_to_token reads its row 0, the row reserved for padding. Lengths and indices
    are read on the device, at every run: the same captured launch serves them all. A run twice gives the
    same result. A captured graph does not own the plan: keep the plan, which keeps the tensors, as long as
    the graph.

    Args:
        mode: 0, 1 or 2.
        bs: requests; 0 is legal and writes element 0 of the prefix sums.
        seq_lens: [>= bs], int32 or int64.
        req_pool_indices: [>= bs], int32 or int64.
        req_to_token: [pool, width], int32.
        page_size: tokens per page of real_page_table.
        topk: the model's index_topk.
        rows_per_req: 1 in DECODE.
        accept_lens: [>= bs], int32; DRAFT_EXTEND only, and required there.
        packed: DRAFT_EXTEND only.
        whole_pages: the caller's word that requests hold whole pages, as a paged allocator gives them:
            req_to_token[r, c] = req_to_token[r, c - c % page_size] + c % page_size in every live column.
            Then one slot of each page is read, and the others follow from it: the same tables from a
            fraction of the bytes. It takes a page size that is a power of two, 4 at least, and tables whose
            rows begin at multiples of 16 bytes; else every column is read, as without it. Where the word
            is wrong, page_table_1 is.
    """

    def __init__(
        self,
        *,
        mode: int,
        bs: int,
        seq_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        destinations: Sequence[MetadataDestination],
        page_size: int,
        topk: int,
        rows_per_req: int = 1,
        accept_lens: torch.Tensor | None = None,
        packed: bool = False,
        whole_pages: bool = False,
    ) -> None:
        fields = [d.tensors() for d in destinations]
        super().__init__(
            seq_lens.device.type,
            "nsa_metadata_generate",
            mode,
            bs,
            seq_lens,
            req_pool_indices,
            req_to_token,
            [t for tensors in fields for t in tensors if t is not None],
            [sum(1 << f for f, t in enumerate(tensors) if t is not None) for tensors in fields],
            [d.seqlens_offset for d in destinations],
            page_size,
            topk,
            rows_per_req,
            accept_lens,
            packed,
            whole_pages,
        )

    def run(self, max_len: int = -1) -> None:
        """Generates, on the current stream. `max_len`, where the host knows it: the longest row, or more.
        It saves time alone: rows that are longer are generated whole. -1 where the launch is captured and
        lengths will change."""
        self._enqueue(max_len)


def fused_metadata_copy_cuda(
    cache_seqlens_src: torch.Tensor,  # [>= bs], int32, as all tensors here
    cu_seqlens_k_src: torch.Tensor,  # [>= bs + 1]
    page_indices_src: torch.Tensor,  # [>= rows, >= cols]
    nsa_cache_seqlens_src: torch.Tensor,  # [>= E]
    seqlens_expanded_src: torch.Tensor | None,  # [>= E]
    nsa_cu_seqlens_k_src: torch.Tensor,  # [>= E + 1]
    real_page_table_src: torch.Tensor | None,  # [>= rows, pages]
    flashmla_num_splits_src: torch.Tensor | None,  # [>= E + 1]
    flashmla_metadata_src: torch.Tensor
    | None,  # any rank; destination: contiguous, at least as many elements
    cache_seqlens_dst: torch.Tensor,
    cu_seqlens_k_dst: torch.Tensor,
    page_table_1_dst: torch.Tensor,
    nsa_cache_seqlens_dst: torch.Tensor,
    seqlens_expanded_dst: torch.Tensor | None,
    nsa_cu_seqlens_k_dst: torch.Tensor,
    real_page_table_dst: torch.Tensor | None,
    flashmla_num_splits_dst: torch.Tensor | None,
    flashmla_metadata_dst: torch.Tensor | None,
    forward_mode: int,
    bs: int,
    max_len: int,
    max_seqlen_k: int,
    seqlens_expanded_size: int,
) -> None:
    """SGLang's copy of one precomputed set into one backend's metadata, in one launch; CPU tensors serve as
    well.

    forward_mode: 0 DECODE, 1 TARGET_VERIFY, 2 DRAFT_EXTEND. E = seqlens_expanded_size (bs in DECODE); rows
    = bs in DECODE, else those of page_indices_src; cols = max_len in DECODE, else max_seqlen_k. Copied:
    cache_seqlens[:bs], cu_seqlens_k[1 : bs + 1], page_indices[:rows, :cols], nsa_cache_seqlens[:E],
    nsa_cu_seqlens_k[1 : E + 1], outside DECODE seqlens_expanded[:E], and where the source is given
    real_page_table[:rows, : the source's width], flashmla_num_splits[: E + 1] and all elements of
    flashmla_metadata in order. A destination without a source is left alone. A destination that is its own
    source is legal.

    As with SGLang's, a source whose rows are not contiguous is copied first (other strides between rows are
    read in place), and a tensor of another dtype "must have dtype int32". Everything else is checked as in
    the plans. The call holds no tensor: one that is captured needs its tensors as long as the graph.
    """
    operator(cache_seqlens_src.device.type, "fused_metadata_copy")(
        cache_seqlens_src,
        cu_seqlens_k_src,
        page_indices_src,
        nsa_cache_seqlens_src,
        seqlens_expanded_src,
        nsa_cu_seqlens_k_src,
        real_page_table_src,
        flashmla_num_splits_src,
        flashmla_metadata_src,
        cache_seqlens_dst,
        cu_seqlens_k_dst,
        page_table_1_dst,
        nsa_cache_seqlens_dst,
        seqlens_expanded_dst,
        nsa_cu_seqlens_k_dst,
        real_page_table_dst,
        flashmla_num_splits_dst,
        flashmla_metadata_dst,
        forward_mode,
        bs,
        max_len,
        max_seqlen_k,
        seqlens_expanded_size,
    )


def fused_metadata_copy_multi_cuda(
    cache_seqlens_src: torch.Tensor,
    cu_seqlens_k_src: torch.Tensor,
    page_indices_src: torch.Tensor,
    nsa_cache_seqlens_src: torch.Tensor,
    nsa_cu_seqlens_k_src: torch.Tensor,
    real_page_table_src: torch.Tensor | None,
    flashmla_num_splits_src: torch.Tensor | None,
    flashmla_metadata_src: torch.Tensor | None,
    cache_seqlens_dst0: torch.Tensor,
    cu_seqlens_k_dst0: torch.Tensor,
    page_table_1_dst0: torch.Tensor,
    nsa_cache_seqlens_dst0: torch.Tensor,
    nsa_cu_seqlens_k_dst0: torch.Tensor,
    real_page_table_dst0: torch.Tensor | None,
    flashmla_num_splits_dst0: torch.Tensor | None,
    flashmla_metadata_dst0: torch.Tensor | None,
    cache_seqlens_dst1: torch.Tensor,
    cu_seqlens_k_dst1: torch.Tensor,
    page_table_1_dst1: torch.Tensor,
    nsa_cache_seqlens_dst1: torch.Tensor,
    nsa_cu_seqlens_k_dst1: torch.Tensor,
    real_page_table_dst1: torch.Tensor | None,
    flashmla_num_splits_dst1: torch.Tensor | None,
    flashmla_metadata_dst1: torch.Tensor | None,
    cache_seqlens_dst2: torch.Tensor,
    cu_seqlens_k_dst2: torch.Tensor,
    page_table_1_dst2: torch.Tensor,
    nsa_cache_seqlens_dst2: torch.Tensor,
    nsa_cu_seqlens_k_dst2: torch.Tensor,
    real_page_table_dst2: torch.Tensor | None,
    flashmla_num_splits_dst2: torch.Tensor | None,
    flashmla_metadata_dst2: torch.Tensor | None,
    bs: int,
    max_len: int,
    seqlens_expanded_size: int,
) -> None:
    """SGLang's copy of one precomputed set into three backends' metadata (DECODE), in one launch.

    Shapes and live parts as in `fused_metadata_copy_cuda` with forward_mode 0, for each of the three
    destinations. For any other number of destinations there is `FusedMetadataCopyPlan`.
    """
    operator(cache_seqlens_src.device.type, "fused_metadata_copy_multi")(
        cache_seqlens_src,
        cu_seqlens_k_src,
        page_indices_src,
        nsa_cache_seqlens_src,
        nsa_cu_seqlens_k_src,
        real_page_table_src,
        flashmla_num_splits_src,
        flashmla_metadata_src,
        cache_seqlens_dst0,
        cu_seqlens_k_dst0,
        page_table_1_dst0,
        nsa_cache_seqlens_dst0,
        nsa_cu_seqlens_k_dst0,
        real_page_table_dst0,
        flashmla_num_splits_dst0,
        flashmla_metadata_dst0,
        cache_seqlens_dst1,
        cu_seqlens_k_dst1,
        page_table_1_dst1,
        nsa_cache_seqlens_dst1,
        nsa_cu_seqlens_k_dst1,
        real_page_table_dst1,
        flashmla_num_splits_dst1,
        flashmla_metadata_dst1,
        cache_seqlens_dst2,
        cu_seqlens_k_dst2,
        page_table_1_dst2,
        nsa_cache_seqlens_dst2,
        nsa_cu_seqlens_k_dst2,
        real_page_table_dst2,
        flashmla_num_splits_dst2,
        flashmla_metadata_dst2,
        bs,
        max_len,
        seqlens_expanded_size,
    )
