"""NSA attention: the backend of one model, and the N backends of the draft steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, MLAInputs
from sglang.srt.layers.attention.nsa.dense_mla import LiveKeys
from sglang.srt.layers.attention.nsa.indexer import all_slots
from sglang.srt.layers.attention.nsa.metadata import (
    MetadataMode,
    MetadataShape,
    NSAMetadata,
    SlotTable,
    as_backend_metadata,
)
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs, precompute_metadata
from sglang.srt.layers.attention.nsa.paths import GraphMetadata, MetadataSelection
from sglang.srt.layers.attention.nsa.schedules import NO_STATE, ReaderState
from sglang.srt.layers.attention.registry import SparseAttentionOps
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

METADATA_MODES: dict[ForwardMode, MetadataMode] = {
    ForwardMode.DECODE: MetadataMode.DECODE,
    ForwardMode.TARGET_VERIFY: MetadataMode.TARGET_VERIFY,
    ForwardMode.DRAFT_EXTEND: MetadataMode.DRAFT_EXTEND,
}


TOPK_MULTIPLE = 128  # of the slots of a row: a library's kernel reads them in blocks


@dataclass(frozen=True)
class NSAConfig:
    """What all backends of a server have in common."""

    topk: int  # index_topk
    page_size: int
    width: int  # columns of a page table: the longest sequence and the drafts beyond it
    device: torch.device
    selection: MetadataSelection
    prefill_ops: SparseAttentionOps
    decode_ops: SparseAttentionOps

    def shape(self, mode: MetadataMode, bs: int, rows_per_req: int) -> MetadataShape:
        return MetadataShape(mode, bs, rows_per_req, self.width, self.page_size, self.topk)


@dataclass(frozen=True)
class RaggedMetadata:
    """EXTEND: T query rows, any number a request."""

    slot_table: SlotTable
    nsa_seqlens_expanded: torch.Tensor  # [T], int32: keys visible to each row
    nsa_cache_seqlens_int32: torch.Tensor  # [T], int32: of these, keys that are attended to
    width: int  # the longest sequence
    reader: ReaderState = NO_STATE


class _GraphHooks:
    """What the graph runner calls on a backend, or on a group of backends that run in one graph."""

    attn_backends: Sequence[NativeSparseAttnBackend]
    config: NSAConfig
    graph_metadata: GraphMetadata | None = None

    def init_cuda_graph_state(
        self,
        max_bs: int,
        mode: MetadataMode,
        rows_per_req: int,
        offsets: Sequence[int],
        in_graph: bool = False,
    ) -> None:
        """Allocates the graph-owned metadata; `offsets` is what each backend adds to the lengths. With
        `in_graph` it is generated in the graph, whatever the layout."""
        shape = self.config.shape(mode, max_bs, rows_per_req)
        self.graph_metadata = GraphMetadata(
            self.config.selection,
            shape,
            offsets,
            self.config.device,
            prepare=self.config.decode_ops.prepare,
            reads=self.config.decode_ops.reads,
            in_graph=in_graph,
        )

    def init_forward_metadata_capture_cuda_graph(self, inputs: MetadataInputs) -> None:
        """Plans one batch size over the graph's static inputs and brings it up to date once. Before each
        replay `graph_metadata.replay` does so."""
        self.graph_metadata.capture(inputs)
        self.graph_metadata.replay(inputs.shape.bs, -1)

    def init_forward_metadata_in_graph(self, bs: int, max_len: int = -1) -> None:
        """The first thing that the captured function does; a replay of a CUDA graph has it behind it."""
        for backend, metadata in zip(self.attn_backends, self.graph_metadata.backends[bs]):
            backend.use(metadata)
        self.graph_metadata.run_in_graph(bs, max_len)

    def check_after_replay(self, bs: int) -> None:
        """Metadata that the graph itself generates can only be checked once the graph has run."""
        if self.graph_metadata.in_graph:
            self.graph_metadata.check(bs)


class NativeSparseAttnBackend(_GraphHooks, AttentionBackend):
    """Sparse MLA attention over the paged cache: index, select the top-k, attend."""

    def __init__(self, config: NSAConfig) -> None:
        self.config = config
        self.attn_backends = (self,)
        self.forward_metadata: NSAMetadata | RaggedMetadata | None = None
        self._width: int | None = None  # of this pass: columns worth looking at
        self._keys: LiveKeys | None = None  # of this pass, where all of them are attended to
        self._slots: torch.Tensor | None = None  # the same for a ragged pass: [T, <= topk], int32

    def use(self, metadata: NSAMetadata | RaggedMetadata) -> None:
        """What this pass reads; its contents may still change until the first layer looks."""
        self.forward_metadata, self._width, self._keys, self._slots = metadata, None, None, None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """The metadata of an eager pass."""
        if forward_batch.forward_mode.is_extend():
            self.use(_ragged_metadata(self.config, forward_batch))
        else:
            self.use(_eager_metadata(self.config, metadata_inputs(self.config, forward_batch)))

    def selects_keys(self) -> bool:
        """On CUDA nobody waits for the lengths: there it depends on the longest that they could be."""
        metadata = self.forward_metadata
        ragged = isinstance(metadata, RaggedMetadata)
        if self._width is None:
            self._width = _live_width(
                metadata.nsa_seqlens_expanded, metadata.width if ragged else self.config.width
            )
        if self._width > self.config.topk:
            return True
        return not ragged and self.config.decode_ops.dense_mla is None

    def forward(self, layer_id: int, inputs: MLAInputs, forward_batch: ForwardBatch) -> torch.Tensor:
        """Writes the layer's keys, selects each query's slots and attends: [queries, H, kv_lora_rank]."""
        pool, loc = forward_batch.token_to_kv_pool, forward_batch.out_cache_loc
        if inputs.kv_latent is not None:
            pool.set_mla_kv_buffer(layer_id, loc, inputs.kv_latent, inputs.k_rope)
            pool.set_index_k_buffer(layer_id, loc, inputs.k_index)

        metadata = self.forward_metadata
        ragged = isinstance(metadata, RaggedMetadata)
        if not ragged and not self.selects_keys():
            return self._attend_to_all(inputs, pool.kv_buffer[layer_id])
        ops = self.config.prefill_ops if ragged else self.config.decode_ops
        lengths, table = metadata.nsa_seqlens_expanded, metadata.slot_table
        if inputs.q_index is None:
            slots = self._all_slots(ops)
        else:
            slots = ops.select_topk(
                inputs.q_index,
                inputs.index_weights,
                pool.index_k_buffer[layer_id],
                table.slots,
                table.rows,
                lengths,
                self.config.topk,
                self._width,
                rows_per_req=table.rows_per_req,
                padding_slot=ops.padding_slot,
            )  # [T, topk], int32
        return ops.sparse_mla(
            inputs.q_nope,
            inputs.q_rope,
            pool.kv_buffer[layer_id],
            slots,
            inputs.softmax_scale,
            metadata.reader,
        )

    def _all_slots(self, ops: SparseAttentionOps) -> torch.Tensor:
        """The slots of a prefill whose rows all attend to all keys, the same for every layer."""
        if self._slots is None:
            metadata, topk = self.forward_metadata, self.config.topk
            # The host knows the longest sequence: nobody looks at slots that cannot be.
            if not ops.fixed_topk:
                topk = min(topk, -(-metadata.width // TOPK_MULTIPLE) * TOPK_MULTIPLE)
            table, lengths = metadata.slot_table, metadata.nsa_seqlens_expanded
            self._slots = all_slots(table.slots, table.rows, lengths, topk, padding_slot=ops.padding_slot)
        return self._slots

    def _attend_to_all(self, inputs: MLAInputs, kv_buffer: torch.Tensor) -> torch.Tensor:
        if self._keys is None:
            metadata = self.forward_metadata
            self._keys = LiveKeys.of(
                metadata.slot_table,
                metadata.nsa_seqlens_expanded,
                metadata.shape.rows_per_req,
                self._width,
                inputs.q_nope.shape[1],
            )
        dense_mla = self.config.decode_ops.dense_mla
        return dense_mla(inputs.q_nope, inputs.q_rope, kv_buffer, self._keys, inputs.softmax_scale)


class NativeSparseAttnMultiStepBackend(_GraphHooks):
    """The N = S - 1 backends of the draft steps, whose metadata is refreshed together."""

    def __init__(self, config: NSAConfig, draft_backends: int) -> None:
        self.config = config
        self.attn_backends = tuple(NativeSparseAttnBackend(config) for _ in range(draft_backends))
        self.offsets = config.selection.draft_offsets(draft_backends)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Eager drafts: each step's metadata, or one for all steps of equal lengths with the flag."""
        inputs = metadata_inputs(self.config, forward_batch)
        computed: dict[int, NSAMetadata] = {}
        for backend, offset in zip(self.attn_backends, self.offsets):
            if offset not in computed or not self.config.selection.enabled:
                computed[offset] = _eager_metadata(self.config, inputs, offset)
            backend.use(computed[offset])


def _eager_metadata(config: NSAConfig, inputs: MetadataInputs, seqlens_offset: int = 0) -> NSAMetadata:
    """Of a pass that runs once: its readers follow req_to_token, so no page table is made."""
    computed = precompute_metadata(inputs, seqlens_offset=seqlens_offset, max_len=0)
    metadata = replace(as_backend_metadata(computed), requests=inputs.slot_table)
    return metadata.prepared(config.decode_ops.prepare)


def metadata_inputs(config: NSAConfig, forward_batch: ForwardBatch) -> MetadataInputs:
    """What the metadata of a batch with a fixed number of rows a request is computed from."""
    bs = forward_batch.batch_size
    mode = METADATA_MODES[forward_batch.forward_mode]
    rows_per_req = forward_batch.input_ids.shape[0] // bs if bs else 1
    return MetadataInputs(
        shape=config.shape(mode, bs, rows_per_req),
        seq_lens=forward_batch.seq_lens,
        req_pool_indices=forward_batch.req_pool_indices,
        req_to_token=forward_batch.req_to_token_pool.req_to_token,
        accept_lens=forward_batch.accept_lens,
    )


def _ragged_metadata(config: NSAConfig, forward_batch: ForwardBatch) -> RaggedMetadata:
    if forward_batch.last_rows is None:
        requests, seqlens = forward_batch.row_requests, (forward_batch.positions + 1).int()
    else:  # in the same dtype: Triton compiles for each
        requests = forward_batch.row_requests[forward_batch.last_rows]
        seqlens = forward_batch.seq_lens
    metadata = RaggedMetadata(
        slot_table=SlotTable(forward_batch.req_to_token_pool.req_to_token, requests),
        nsa_seqlens_expanded=seqlens,
        nsa_cache_seqlens_int32=seqlens.clamp(max=config.topk),
        width=max(forward_batch.seq_lens_cpu, default=0),
    )
    prepare = config.prefill_ops.prepare
    return metadata if prepare is None else replace(metadata, reader=prepare(metadata))


def _live_width(lengths: torch.Tensor, width: int) -> int:
    """Columns worth looking at. On the CPU reading the longest length costs nothing."""
    if lengths.device.type != "cpu":
        return width
    return min(int(lengths.max()), width) if lengths.numel() else 0
