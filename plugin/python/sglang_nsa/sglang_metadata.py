"""SGLang's metadata objects seen through the portable core's, without copying a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from .family import UnsupportedError
from .nsa.metadata import MetadataMode, MetadataShape, NSAFlashMLAMetadata, NSAMetadata

# What the generator writes; {p} is nsa or dsa.
_GENERATED = (
    "cache_seqlens_int32",
    "cu_seqlens_k",
    "page_table_1",
    "real_page_table",
    "{p}_cache_seqlens_int32",
    "{p}_cu_seqlens_k",
    "{p}_seqlens_expanded",
)
_CONSTANT = ("cu_seqlens_q", "{p}_cu_seqlens_q")  # ranges, fixed at capture
DERIVED = ("paged_mqa_schedule_metadata", "paged_mqa_ctx_lens_2d", "topk_v2_plan", "flashmla_metadata")


def tensor_fields(metadata: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields that hold a tensor or a group of tensors."""
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        if isinstance(value, (torch.Tensor, tuple)) or dataclasses.is_dataclass(value):
            yield field.name, value


def fields_besides(metadata: Any, prefix: str) -> list[str]:
    """Fields with tensors that the generator does not write: derived ones, and what is not known."""
    known = {name.format(p=prefix) for name in (*_GENERATED, *_CONSTANT)}
    return [name for name, _ in tensor_fields(metadata) if name not in known]


def unknown_fields(metadata: Any, prefix: str) -> list[str]:
    """Fields with tensors that the plugin does not bring up to date (pooled keys, what comes later)."""
    return [name for name in fields_besides(metadata, prefix) if name not in DERIVED]


def core_view(metadata: Any, prefix: str, topk: int, apart_from: torch.Tensor | None = None) -> NSAMetadata:
    """The core's names for the tensors of one captured DECODE batch.

    Up to 0.5.13 `cache_seqlens_int32` is the runner's own buffer of lengths, given as `apart_from`: it is
    left out, since what is read needs no writing. Raises UnsupportedError where SGLang does without a table.
    """
    p = prefix
    table, pages = metadata.page_table_1, metadata.real_page_table
    if table is None:
        raise UnsupportedError("page_table_1 is not there")
    lengths = metadata.cache_seqlens_int32  # [bs], int32
    expanded = getattr(metadata, f"{p}_seqlens_expanded")
    if expanded.data_ptr() != lengths.data_ptr():
        raise UnsupportedError(f"{p}_seqlens_expanded is not cache_seqlens_int32")
    is_input = apart_from is not None and lengths.data_ptr() == apart_from.data_ptr()
    flashmla = metadata.flashmla_metadata
    return NSAMetadata(
        shape=MetadataShape(
            MetadataMode.DECODE, lengths.shape[0], 1, table.shape[1], int(metadata.page_size), topk
        ),
        cache_seqlens_int32=None if is_input else lengths,
        cu_seqlens_k=metadata.cu_seqlens_k,
        page_table_1=table,
        nsa_seqlens_expanded=lengths,
        nsa_cache_seqlens_int32=getattr(metadata, f"{p}_cache_seqlens_int32"),
        nsa_cu_seqlens_k=getattr(metadata, f"{p}_cu_seqlens_k"),
        real_page_table=None if metadata.page_size == 1 else pages,
        flashmla_metadata=None
        if flashmla is None
        else NSAFlashMLAMetadata(flashmla.flashmla_metadata, flashmla.num_splits),
    )


def page_table_bytes(state: dict[Any, Any]) -> int:
    """Bytes of page tables that a backend's graph state holds."""
    tables = [state.get("page_table"), state.get("real_page_table")]
    return sum(table.numel() * table.element_size() for table in tables if isinstance(table, torch.Tensor))
