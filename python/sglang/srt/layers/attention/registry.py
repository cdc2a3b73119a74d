"""The implementations of sparse attention, and the choice among them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang.srt.layers.attention.nsa.dims import AttentionDims
from sglang.srt.layers.attention.nsa.schedules import NO_STATE, Prepare, ReaderState

logger = logging.getLogger(__name__)

# What both indexers read: the slots of a row's positions, and how many of them count. Without page tables the
# slots come from req_to_token.
SELECTION_READS = frozenset({"page_table_1", "nsa_seqlens_expanded"})


@dataclass(frozen=True)
class SparseAttentionOps:
    """The two halves of sparse MLA attention; signatures in `nsa/indexer.py` and `nsa/sparse_mla.py`.

    `sparse_mla` takes one more argument, the state that `prepare` made for the batch size (None: it
    needs none). Slots come with those that count first in each row, then `padding_slot`.
    """

    name: str
    select_topk: Callable[..., torch.Tensor]
    sparse_mla: Callable[..., torch.Tensor]
    prepare: Prepare | None = None
    padding_slot: int = -1  # what `sparse_mla` takes beyond a row's slots
    reads: frozenset[str] = SELECTION_READS  # fields of the metadata
    dense_mla: Callable[..., torch.Tensor] | None = None  # of rows that attend to all: `nsa/dense_mla.py`
    fixed_topk: bool = False  # the state is made for rows of index_topk slots, and no fewer


def _without_state(sparse_mla: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def attend(
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        kv_buffer: torch.Tensor,
        topk_slots: torch.Tensor,
        softmax_scale: float,
        reader: ReaderState = NO_STATE,
    ) -> torch.Tensor:
        return sparse_mla(q_nope, q_rope, kv_buffer, topk_slots, softmax_scale)

    return attend


def _torch_ops(dims: AttentionDims | None, device: torch.device) -> SparseAttentionOps:
    from sglang.srt.layers.attention.nsa.dense_mla import dense_mla
    from sglang.srt.layers.attention.nsa.indexer import select_topk
    from sglang.srt.layers.attention.nsa.sparse_mla import sparse_mla

    return SparseAttentionOps("torch", select_topk, _without_state(sparse_mla), dense_mla=dense_mla)


@functools.cache
def triton_indexer(device: torch.device) -> Callable[..., torch.Tensor]:
    """`select_topk` with the kernel library's kernels, or with Triton's where the library is missing."""
    from sglang.srt.layers.attention.nsa.indexer_triton import select_topk
    from sglang.srt.layers.attention.nsa.kernels import load_kernels

    try:
        library = load_kernels(device.type)
    except ImportError as reason:
        logger.warning("the indexer's scores and top-k are Triton's, which are slower: %s", reason)
        return select_topk
    if library.serves_index_scores(device, torch.bfloat16, 64, 128):
        logger.info(
            "index scores: the kernel library's for bfloat16 with 32 or 64 heads of 128, else Triton's"
        )
    else:
        logger.info("index scores: Triton's; the kernel library's need Hopper, and a library built for sm_90")
    return functools.partial(select_topk, library=library)


def _triton_ops(dims: AttentionDims | None, device: torch.device) -> SparseAttentionOps:
    from sglang.srt.layers.attention.nsa.sparse_mla_triton import sparse_mla

    return SparseAttentionOps("triton", triton_indexer(device), _without_state(sparse_mla))


def _flashinfer_ops(dims: AttentionDims | None, device: torch.device) -> SparseAttentionOps:
    from sglang.srt.layers.attention.sparse_mla_flashinfer import FlashInferSparseMLA

    attention = FlashInferSparseMLA(dims, device)
    return SparseAttentionOps(
        "flashinfer", triton_indexer(device), attention.sparse_mla, attention.prepare, attention.padding_slot
    )


def _flashmla_sparse_ops(dims: AttentionDims | None, device: torch.device) -> SparseAttentionOps:
    from sglang.srt.layers.attention.sparse_mla_flashmla import FlashMLASparse

    attention = FlashMLASparse(dims)
    if torch.cuda.is_available():
        attention.check_runs(device)
    return SparseAttentionOps(
        "flashmla_sparse", triton_indexer(device), attention.sparse_mla, attention.prepare
    )


def _flashmla_kv_ops(dims: AttentionDims | None, device: torch.device) -> SparseAttentionOps:
    from sglang.srt.layers.attention.sparse_mla_flashmla import FlashMLAKV

    attention = FlashMLAKV(dims, device)
    return SparseAttentionOps(
        "flashmla_kv", triton_indexer(device), attention.sparse_mla, attention.prepare, fixed_topk=True
    )


@dataclass(frozen=True)
class Implementation:
    """How to build one implementation, and which passes it serves."""

    build: Callable[[AttentionDims | None, torch.device], SparseAttentionOps]
    reads: frozenset[str] = SELECTION_READS  # fields of the metadata
    of_library: bool = False  # serves only dimensions that the library was compiled for
    prefill: bool = True  # False: only passes with a fixed number of rows a request


IMPLEMENTATIONS: dict[str, Implementation] = {
    "torch": Implementation(_torch_ops),
    "triton": Implementation(_triton_ops),
    "flashinfer": Implementation(
        _flashinfer_ops, SELECTION_READS | {"nsa_cache_seqlens_int32"}, of_library=True, prefill=False
    ),
    "flashmla_sparse": Implementation(
        _flashmla_sparse_ops, SELECTION_READS | {"nsa_cache_seqlens_int32"}, of_library=True
    ),
    "flashmla_kv": Implementation(
        _flashmla_kv_ops,
        SELECTION_READS | {"flashmla_metadata.flashmla_metadata", "flashmla_metadata.num_splits"},
        of_library=True,
    ),
}


def _built(
    implementation: Implementation, dims: AttentionDims | None, device: torch.device
) -> SparseAttentionOps:
    return replace(implementation.build(dims, device), reads=implementation.reads)


# What `auto` looks for on CUDA, the fastest first, as measured (docs/attention_backends.md). Such a kernel
# has a program for each row, or for each 64 heads of it: the fastest once they fill the device. Below that
# Triton divides the keys of each row, and where no library serves, it does everything.
AUTO_LIBRARIES = ("flashmla_sparse",)
FILLING_ROWS = 16


def _by_rows(few: SparseAttentionOps, many: SparseAttentionOps, rows: int) -> SparseAttentionOps:
    """`many` for passes of at least so many rows, which is known when a graph is captured, else `few`."""
    assert few.prepare is None and few.padding_slot == many.padding_slot

    def attend(q_nope: torch.Tensor, *inputs: Any) -> torch.Tensor:
        return (many if q_nope.shape[0] >= rows else few).sparse_mla(q_nope, *inputs)

    name = f"{many.name} from {rows} rows, {few.name} below"
    return replace(many, name=name, sparse_mla=attend, reads=few.reads | many.reads)


def _auto_ops(device: torch.device, role: str, dims: AttentionDims | None) -> SparseAttentionOps:
    """The fastest that is installed and serves the model; logged, with why others were passed over."""
    if device.type != "cuda":
        logger.info("sparse attention for %s: auto chose torch (device %s)", role, device.type)
        return _built(IMPLEMENTATIONS["torch"], dims, device)
    chosen, passed_over = _built(IMPLEMENTATIONS["triton"], dims, device), []
    for name in AUTO_LIBRARIES:
        try:
            chosen = _by_rows(chosen, _named_ops(name, device, role, dims), FILLING_ROWS)
            break
        except (ImportError, ValueError) as reason:
            passed_over.append(f"; not {name}: {reason}")
    logger.info("sparse attention for %s: auto chose %s%s", role, chosen.name, "".join(passed_over))
    return chosen


def select_attention_ops(
    name: str, device: torch.device, role: str, dims: AttentionDims | None = None
) -> SparseAttentionOps:
    """The implementation of that name; 'auto' is the fastest on CUDA, torch elsewhere, and is logged.

    `dims` are those of the model, which a library's kernels may not serve.

    Raises ImportError where an implementation asked for by name is not available, and ValueError where there
    is none of that name or it does not serve the model or the role.
    """
    return _auto_ops(device, role, dims) if name == "auto" else _named_ops(name, device, role, dims)


def _named_ops(name: str, device: torch.device, role: str, dims: AttentionDims | None) -> SparseAttentionOps:
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"sparse attention implementation for {role} must be auto or one of {list(IMPLEMENTATIONS)}, "
            f"got {name!r}"
        )
    implementation = IMPLEMENTATIONS[name]
    if role == "prefill" and not implementation.prefill:
        raise ValueError(f"sparse attention implementation {name} serves decode only, got it for {role}")
    if implementation.of_library:
        if device.type != "cuda":
            raise ValueError(f"sparse attention implementation {name} for {role} needs CUDA, got {device}")
        if dims is None:
            raise ValueError(f"sparse attention implementation {name} for {role} needs the model's dims")
    try:
        return _built(implementation, dims, device)
    except ImportError as error:
        raise ImportError(f"sparse attention implementation {name} for {role}: {error}") from error
