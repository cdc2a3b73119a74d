"""The reference: the metadata of one step, in every mode, computed once in plain torch.

The name is that of SGLang's module for the draft steps; here it serves DECODE, TARGET_VERIFY and
DRAFT_EXTEND, with and without drafts. Every generator leaves the same bits, every check compares with it.

Where `max_len` is not given nothing is read back from the device, at the price of full-width tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .metadata import MetadataMode, MetadataShape, PrecomputedMetadata, SlotTable


@dataclass(frozen=True)
class MetadataInputs:
    """What the metadata of one captured batch is computed from: the graph's static input buffers."""

    shape: MetadataShape
    seq_lens: torch.Tensor  # [bs], int32 or int64
    req_pool_indices: torch.Tensor  # [bs], int32 or int64
    req_to_token: torch.Tensor  # [pool, >= width], int32
    accept_lens: torch.Tensor | None = None  # [bs], int32: DRAFT_EXTEND
    # The slots of a page follow each other in every live column: a generator may read the first and no other.
    whole_pages: bool = False

    @property
    def slot_table(self) -> SlotTable:
        """For readers that do without page tables."""
        return SlotTable(self.req_to_token, self.req_pool_indices, self.shape.rows_per_req)


def precompute_metadata(
    inputs: MetadataInputs, *, seqlens_offset: int = 0, max_len: int | None = None
) -> PrecomputedMetadata:
    """The metadata of `inputs`, whose every sequence length counts `seqlens_offset` more.

    `max_len` bounds every row's length and is the width of the tables (default: shape.width). In
    DRAFT_EXTEND a request has a fixed number of rows, those past its accepted tokens with length 0.
    """
    shape = inputs.shape
    width = shape.width if max_len is None else min(max_len, shape.width)
    seq_lens = (inputs.seq_lens.to(torch.int32) + seqlens_offset).clamp(min=0)  # [bs]
    if shape.mode is MetadataMode.DECODE:
        cache_seqlens, lengths = seq_lens, seq_lens
        tokens = _request_tokens(inputs, width)
    elif shape.mode is MetadataMode.TARGET_VERIFY:
        cache_seqlens = seq_lens + shape.rows_per_req
        lengths = (seq_lens[:, None] + _steps(inputs) + 1).flatten()
        tokens = _row_tokens(inputs, width)
    else:
        cache_seqlens = seq_lens
        lengths = _draft_extend_lengths(inputs, seq_lens)
        tokens = _row_tokens(inputs, width)

    nsa_cache_seqlens = lengths.clamp(max=shape.topk)
    return PrecomputedMetadata(
        shape=shape,
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=_prefix_sum(cache_seqlens),
        page_indices=tokens,
        seqlens_expanded=lengths,
        nsa_cache_seqlens=nsa_cache_seqlens,
        nsa_cu_seqlens_k=_prefix_sum(nsa_cache_seqlens),
        real_page_table=tokens[:, :: shape.page_size] // shape.page_size if shape.page_size > 1 else None,
    )


def _steps(inputs: MetadataInputs) -> torch.Tensor:  # [rows_per_req], int32
    return torch.arange(inputs.shape.rows_per_req, dtype=torch.int32, device=inputs.seq_lens.device)


def _request_tokens(inputs: MetadataInputs, width: int) -> torch.Tensor:  # [bs, width], int32
    return inputs.req_to_token[:, :width].index_select(0, inputs.req_pool_indices)


def _row_tokens(inputs: MetadataInputs, width: int) -> torch.Tensor:  # [E, width], int32
    rows = _request_tokens(inputs, width)[:, None].expand(-1, inputs.shape.rows_per_req, -1)
    return rows.flatten(0, 1)


def _draft_extend_lengths(inputs: MetadataInputs, seq_lens: torch.Tensor) -> torch.Tensor:  # [E], int32
    """kv_len - accepted + 1 .. kv_len for each request, then 0 for its other rows."""
    if inputs.accept_lens is None:
        raise ValueError("DRAFT_EXTEND needs accept_lens, got None")
    accepted = inputs.accept_lens.clamp(0, inputs.shape.rows_per_req)[:, None]  # [bs, 1]
    steps = _steps(inputs)
    # A padded request has length 1 whatever it is said to have accepted: lengths clamp at 0.
    return ((seq_lens[:, None] - accepted + 1 + steps).clamp(min=0) * (steps < accepted)).flatten()


def _prefix_sum(lengths: torch.Tensor) -> torch.Tensor:  # [n] -> [n + 1], int32, from 0
    return torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))
