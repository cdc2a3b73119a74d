"""Computes the metadata of one step once, in plain torch: the reference that every faster path equals.

Where `max_len` is not given nothing is read back from the device, at the price of full-width tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .metadata import MetadataMode, MetadataShape, PrecomputedMetadata


@dataclass(frozen=True)
class MetadataInputs:
    """What the metadata of one captured batch is computed from: the graph's static input buffers."""

    shape: MetadataShape
    seq_lens: torch.Tensor  # [bs], int32 or int64
    req_pool_indices: torch.Tensor  # [bs], int32 or int64
    req_to_token: torch.Tensor  # [pool, >= width], int32
    accept_lens: torch.Tensor | None = None  # [bs], int32: DRAFT_EXTEND


def precompute_metadata(
    inputs: MetadataInputs, *, seqlens_offset: int = 0, max_len: int | None = None, packed: bool = False
) -> PrecomputedMetadata:
    """The metadata of `inputs`, whose every sequence length counts `seqlens_offset` more.

    `max_len` bounds every row's length and is the width of the tables (default: shape.width). In
    DRAFT_EXTEND a request has a fixed number of rows, those past its accepted tokens with length 0;
    `packed` gives it as many rows as it accepted tokens, which reads the total back from the device.
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
        tokens = _request_tokens(inputs, width).repeat_interleave(shape.rows_per_req, dim=0)
    else:
        cache_seqlens = seq_lens
        lengths, tokens = _draft_extend_rows(inputs, seq_lens, width, packed)

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


def _draft_extend_rows(
    inputs: MetadataInputs, seq_lens: torch.Tensor, width: int, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row lengths [E] and tables [E, width]: kv_len - accepted + 1 .. kv_len for each request."""
    if inputs.accept_lens is None:
        raise ValueError("DRAFT_EXTEND needs accept_lens, got None")
    rows_per_req = inputs.shape.rows_per_req
    accepted = inputs.accept_lens.clamp(0, rows_per_req)[:, None]  # [bs, 1]
    steps = _steps(inputs)
    live = steps < accepted  # [bs, rows_per_req]
    # A padded request has length 1 whatever it is said to have accepted: lengths clamp at 0.
    lengths = (seq_lens[:, None] - accepted + 1 + steps).clamp(min=0) * live
    tokens = _request_tokens(inputs, width)
    if not packed:
        return lengths.flatten(), tokens.repeat_interleave(rows_per_req, dim=0)
    return lengths[live], tokens.repeat_interleave(accepted.flatten(), dim=0)


def _prefix_sum(lengths: torch.Tensor) -> torch.Tensor:  # [n] -> [n + 1], int32, from 0
    return torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))
