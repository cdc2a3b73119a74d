"""SGLang's metadata as data: what a kind of attention backend keeps, and which of it the generator writes.

A kind is one `FieldMap`. Whatever plans, shares, tries, verifies or measures metadata walks it, so a kind
whose fields follow from lengths and token table needs no code of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from .nsa.metadata import TABLE_FIELDS, MetadataMode, MetadataShape, NSAFlashMLAMetadata, NSAMetadata

STATE = "decode_cuda_graph_metadata"  # of a backend: its buffers by name, its planned sizes by number


class UnsupportedError(Exception):
    """What this SGLang or this server has that the plugin does not know; the reason."""


class MissingError(UnsupportedError):
    """This SGLang has no such backend, or does not import it here; so no server can use it either."""


@dataclass(frozen=True)
class FieldMap:
    """The metadata class of one kind of backend, and the graph state behind it."""

    generated: Mapping[str, str]  # the core's name -> SGLang's: what the generator writes
    constant: frozenset[str]  # ranges, fixed at capture
    page_size: tuple[str, ...]  # the backend's attribute, under its name of each release
    derived: frozenset[str] = frozenset()  # follows from what is generated: derived.py
    topk: str | None = None  # the backend's attribute, where lengths are cut at it
    # Draft step i counts i + 1 tokens more than are committed: each backend has lengths of its own. Else all
    # backends hold the same, and can have one set.
    by_step: bool = False
    own_state: frozenset[str] = frozenset()  # buffers in STATE that backends cannot share
    # What `init_cuda_graph_state` may set on a backend. All is shared but `own_by_init`.
    set_by_init: frozenset[str] = frozenset({STATE})
    own_by_init: frozenset[str] = frozenset()
    # Of a backend, true where metadata is more than the generator knows -> what that is.
    left_alone: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _sparse(prefix: str) -> FieldMap:
    """NSA, from 0.5.13 called DSA: every draft step sees the same lengths."""
    p = prefix
    return FieldMap(
        generated={
            "cache_seqlens_int32": "cache_seqlens_int32",
            "cu_seqlens_k": "cu_seqlens_k",
            "page_table_1": "page_table_1",
            "real_page_table": "real_page_table",
            "nsa_cache_seqlens_int32": f"{p}_cache_seqlens_int32",
            "nsa_cu_seqlens_k": f"{p}_cu_seqlens_k",
            "nsa_seqlens_expanded": f"{p}_seqlens_expanded",
        },
        constant=frozenset({"cu_seqlens_q", f"{p}_cu_seqlens_q"}),
        page_size=("physical_page_size", "real_page_size"),
        derived=frozenset(
            {"paged_mqa_schedule_metadata", "paged_mqa_ctx_lens_2d", "topk_v2_plan", "flashmla_metadata"}
        ),
        topk=f"{p}_index_topk",
        set_by_init=frozenset({STATE, "dsa_drop_wide_page_table", "_multi_ctas_kv_counter_buffer"}),
        own_by_init=frozenset({"_multi_ctas_kv_counter_buffer"}),
    )


NSA, DSA = _sparse("nsa"), _sparse("dsa")

# FlashAttention 3 and 4 with chain drafts: the page table is the same for all steps, up to the longest.
FA3 = FieldMap(
    generated={
        "cache_seqlens_int32": "cache_seqlens_int32",
        "cu_seqlens_k": "cu_seqlens_k",
        "real_page_table": "page_table",
    },
    constant=frozenset({"cu_seqlens_q"}),
    page_size=("page_size",),
    by_step=True,
    own_state=frozenset({"cache_seqlens", "cu_seqlens_k"}),
    # Beside STATE they are of other modes, in which a draft step's backend never runs.
    set_by_init=frozenset(
        {
            STATE,
            "_sched_meta_buf",
            "_verify_mask",
            "cuda_graph_custom_mask",
            "draft_extend_metadata",
            "encoder_metadata",
            "target_verify_metadata",
        }
    ),
    left_alone={
        "use_sliding_window_kv_pool": "a sliding window has page tables of its own",
        "is_prefill_aware_swa": "the sliding window depends on the prompt",
        "has_local_attention": "local attention has metadata of its own",
        "is_encoder_decoder": "an encoder has lengths of its own",
        "_unified_dense": "page tables go through the unified memory pool",
        "kv_index_translator.is_translating": "page tables go through the unified memory pool",
        "_kv_shard_pool": "keys and values lie in shards",
    },
)


def attribute(owner: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    try:
        return attrgetter(path)(owner)
    except AttributeError:
        return None


@dataclass(frozen=True)
class MetadataForm:
    """A field map with the sizes of one server's backends."""

    fields: FieldMap
    page_size: int
    topk: int  # 1 where nothing is cut

    @classmethod
    def of(cls, fields: FieldMap, backend: Any) -> MetadataForm:
        found = (attribute(backend, name) for name in fields.page_size)
        page_size = next((size for size in found if size is not None), None)
        if page_size is None:
            raise UnsupportedError(f"the backend has none of {', '.join(fields.page_size)}")
        return cls(fields, int(page_size), 1 if fields.topk is None else getattr(backend, fields.topk))

    def seqlens_offset(self, backend: Any) -> int:
        """What the backend's lengths count beyond the committed tokens."""
        return backend.speculative_step_id + 1 if self.fields.by_step else 0

    def name(self, core: str) -> str:
        """SGLang's name for a field of the core's."""
        generated = self.fields.generated
        if core not in generated and core == "page_table_1":
            core = "real_page_table"  # pages of one slot
        return generated.get(core, core)

    def besides(self, metadata: Any) -> list[str]:
        """Fields with tensors that the generator does not write: derived ones, and what is not known."""
        known = {*self.fields.generated.values(), *self.fields.constant}
        return [name for name, _ in tensor_fields(metadata) if name not in known]

    def unknown(self, metadata: Any) -> list[str]:
        """Fields with tensors that the plugin does not bring up to date (pooled keys, what comes later)."""
        return [name for name in self.besides(metadata) if name not in self.fields.derived]

    def view(self, metadata: Any, apart_from: torch.Tensor | None = None) -> NSAMetadata:
        """The core's names for the tensors of one captured DECODE batch, without copying one.

        Up to 0.5.13 NSA's `cache_seqlens_int32` is the runner's own buffer of lengths, given as
        `apart_from`: it is left out, since what is read needs no writing. Raises UnsupportedError where
        SGLang does without a table.
        """
        found = {core: getattr(metadata, name) for core, name in self.fields.generated.items()}
        if self.page_size == 1:  # pages are slots
            pages = found.pop("real_page_table")
            found.setdefault("page_table_1", pages)
        for core in TABLE_FIELDS & found.keys():
            if found[core] is None:
                raise UnsupportedError(f"{self.fields.generated.get(core, core)} is not there")
        lengths = found.pop("cache_seqlens_int32")  # [bs], int32
        expanded = found.pop("nsa_seqlens_expanded", lengths)
        if expanded.data_ptr() != lengths.data_ptr():
            raise UnsupportedError("the lengths of rows are not those of requests")
        is_input = apart_from is not None and lengths.data_ptr() == apart_from.data_ptr()
        flashmla = getattr(metadata, "flashmla_metadata", None)
        return NSAMetadata(
            shape=self._shape(lengths.shape[0], found),
            cache_seqlens_int32=None if is_input else lengths,
            nsa_seqlens_expanded=lengths,
            flashmla_metadata=None
            if flashmla is None
            else NSAFlashMLAMetadata(flashmla.flashmla_metadata, flashmla.num_splits),
            **found,
        )

    def _shape(self, bs: int, found: Mapping[str, torch.Tensor]) -> MetadataShape:
        tokens = found.get("page_table_1")
        width = found["real_page_table"].shape[1] * self.page_size if tokens is None else tokens.shape[1]
        return MetadataShape(MetadataMode.DECODE, bs, 1, width, self.page_size, self.topk)


def tensor_fields(metadata: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields that hold a tensor or a group of tensors."""
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        items = value if isinstance(value, tuple) else (value,)
        if any(isinstance(item, torch.Tensor) or dataclasses.is_dataclass(item) for item in items):
            yield field.name, value


def page_table_bytes(backend: Any, fields: FieldMap) -> int:
    """Bytes of page tables in what `init_cuda_graph_state` set on a backend."""
    states = (attribute(backend, name) for name in fields.set_by_init)
    tables = [
        value
        for state in states
        if isinstance(state, dict)
        for name, value in state.items()
        if "page_table" in str(name) and isinstance(value, torch.Tensor)
    ]
    return sum(table.numel() * table.element_size() for table in tables)
