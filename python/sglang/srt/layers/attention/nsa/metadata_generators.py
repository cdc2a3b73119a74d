"""Generators: bring the metadata of several destinations up to date from the graph's input buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .kernels import load_kernels
from .metadata import MetadataMode, NSAMetadata, fields_of
from .nsa_backend_mtp_precompute import MetadataInputs, precompute_metadata


@dataclass(frozen=True)
class Destination:
    """One set of metadata to generate; draft step i counts i + 1 tokens more than are committed."""

    metadata: NSAMetadata
    seqlens_offset: int = 0
    owns_tables: bool = True  # False: the page tables are another destination's, with longer rows


class Generator(Protocol):
    def run(self, max_len: int) -> None:
        """Writes all destinations. `max_len` bounds the row lengths; -1 where the host knows no bound."""
        ...


class TorchGenerator:
    """The reference computation, then one `copy_` a field: works everywhere."""

    def __init__(self, inputs: MetadataInputs, destinations: Sequence[Destination]) -> None:
        self.inputs = inputs
        self.destinations = tuple(destinations)

    def run(self, max_len: int) -> None:
        width = self.inputs.shape.width if max_len < 0 else max_len
        for destination in self.destinations:
            metadata = destination.metadata
            computed = precompute_metadata(
                self.inputs,
                seqlens_offset=destination.seqlens_offset,
                max_len=width if destination.owns_tables else 0,
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
        kernels = load_kernels(inputs.seq_lens.device.type)
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
        )

    @staticmethod
    def _kernel_destination(kernels, destination: Destination):
        metadata = destination.metadata
        own = destination.owns_tables
        expanded = metadata.shape.mode is not MetadataMode.DECODE  # else it is cache_seqlens_int32 itself
        return kernels.MetadataDestination(
            cache_seqlens=metadata.cache_seqlens_int32,
            cu_seqlens_k=metadata.cu_seqlens_k,
            page_table_1=metadata.page_table_1 if own else metadata.page_table_1[:, :0],
            nsa_cache_seqlens=metadata.nsa_cache_seqlens_int32,
            nsa_cu_seqlens_k=metadata.nsa_cu_seqlens_k,
            seqlens_expanded=metadata.nsa_seqlens_expanded if expanded else None,
            real_page_table=metadata.real_page_table if own else None,
            seqlens_offset=destination.seqlens_offset,
        )

    def run(self, max_len: int) -> None:
        self.plan.run()
