"""Generators: bring the metadata of several destinations up to date from the graph's input buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from .kernels import load_kernels
from .metadata import MetadataMode, NSAMetadata, fields_of
from .nsa_backend_mtp_precompute import MetadataInputs, precompute_metadata


@dataclass(frozen=True)
class Destination:
    """One set of metadata to generate, as far as it is there: a field that is None is not computed.

    Draft step i counts i + 1 tokens more than are committed.
    """

    metadata: NSAMetadata
    seqlens_offset: int = 0
    owns_tables: bool = True  # False: the page tables are another destination's, with longer rows


class Generator(Protocol):
    """`run` writes all destinations; given a bound of the row lengths (-1: the host knows none)."""

    run: Callable[[int], None]


class TorchGenerator:
    """The reference computation, then one `copy_` a field: works everywhere."""

    def __init__(self, inputs: MetadataInputs, destinations: Sequence[Destination]) -> None:
        self.inputs = inputs
        self.destinations = tuple(destinations)

    def run(self, max_len: int) -> None:
        width = self.inputs.shape.width if max_len < 0 else max_len
        for destination in self.destinations:
            metadata = destination.metadata
            tables = destination.owns_tables and metadata.page_table_1 is not None
            computed = precompute_metadata(
                self.inputs, seqlens_offset=destination.seqlens_offset, max_len=width if tables else 0
            )
            for field in fields_of(metadata.shape.mode):
                source, target = field.of(computed), field.of(metadata)
                if source is None or target is None:
                    continue
                if field.is_table:
                    target = target[:, : source.shape[1]]
                target.copy_(source)


class FusedGenerator:
    """One launch that reads lengths, request indices and token table, and writes every field of every
    destination (`nsa_metadata_generate`). Reads nothing on the host, so it can be captured."""

    def __init__(self, inputs: MetadataInputs, destinations: Sequence[Destination]) -> None:
        self.device_type = inputs.seq_lens.device.type
        kernels = load_kernels(self.device_type)
        shape = inputs.shape
        self.plan = kernels.NSAMetadataGeneratePlan(
            mode=int(shape.mode),
            bs=shape.bs,
            seq_lens=inputs.seq_lens,
            req_pool_indices=inputs.req_pool_indices,
            req_to_token=inputs.req_to_token,
            destinations=[self._kernel_destination(kernels, d) for d in destinations],
            page_size=shape.page_size,
            topk=shape.topk,
            rows_per_req=shape.rows_per_req,
            accept_lens=inputs.accept_lens,
            whole_pages=inputs.whole_pages,
        )
        self.run: Callable[[int], None] = kernels.bind_generate(self.plan)

    @staticmethod
    def _kernel_destination(kernels: ModuleType, destination: Destination) -> Any:
        metadata = destination.metadata
        own = destination.owns_tables
        expanded = metadata.shape.mode is not MetadataMode.DECODE  # else it is cache_seqlens_int32 itself
        return kernels.MetadataDestination(
            cache_seqlens=metadata.cache_seqlens_int32,
            cu_seqlens_k=metadata.cu_seqlens_k,
            page_table_1=metadata.page_table_1 if own else None,
            nsa_cache_seqlens=metadata.nsa_cache_seqlens_int32,
            nsa_cu_seqlens_k=metadata.nsa_cu_seqlens_k,
            seqlens_expanded=metadata.nsa_seqlens_expanded if expanded else None,
            real_page_table=metadata.real_page_table if own else None,
            seqlens_offset=destination.seqlens_offset,
        )
