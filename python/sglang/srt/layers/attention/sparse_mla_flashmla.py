"""Sparse MLA with DeepSeek's FlashMLA (https://github.com/deepseek-ai/FlashMLA)."""

from __future__ import annotations

import functools
import logging

import torch

from sglang.srt.layers.attention.nsa.dims import AttentionDims
from sglang.srt.layers.attention.nsa.metadata import NSAFlashMLAMetadata, NSAMetadata
from sglang.srt.layers.attention.nsa.schedules import NO_STATE, ReaderState
from sglang.srt.libraries.flashmla import HEAD_COUNTS, FlashMLALibrary, load_flashmla
from sglang.srt.mem_cache.fp8_kv import PAGE

logger = logging.getLogger(__name__)

LATENT, ROPE = 512, 64  # the only dimensions that FlashMLA is compiled for
TOPK_MULTIPLE = 128  # two blocks of 64 slots at a time
STATES_KEPT = 64  # of eager passes; a captured graph keeps its own


def padded_heads(dims: AttentionDims) -> int:
    """The head count that the kernel is called with. Raises ValueError where it cannot serve the model."""
    dims.require("FlashMLA", kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, dtype=torch.bfloat16)
    if dims.index_topk % TOPK_MULTIPLE:
        raise ValueError(f"FlashMLA needs index_topk a multiple of {TOPK_MULTIPLE}, got {dims.index_topk}")
    for count in HEAD_COUNTS:
        if count >= dims.num_attention_heads:
            return count
    raise ValueError(
        f"FlashMLA needs num_attention_heads at most {HEAD_COUNTS[-1]}, got {dims.num_attention_heads}"
    )


def side_by_side(q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
    """[T, H, 576]: the tensor that both are parts of, where they are, else a copy."""
    rows, heads, _ = q_nope.shape
    stride = (heads * (LATENT + ROPE), LATENT + ROPE, 1)
    follows = q_rope.data_ptr() == q_nope.data_ptr() + LATENT * q_nope.element_size()
    if follows and q_nope.stride() == q_rope.stride() == stride:
        return q_nope.as_strided((rows, heads, LATENT + ROPE), stride)
    return torch.cat((q_nope, q_rope), dim=-1)


def padded_query(q_nope: torch.Tensor, q_rope: torch.Tensor, padded: int) -> torch.Tensor:
    """[T, padded heads, 576]; the heads beyond the model's are zeros."""
    rows, heads, _ = q_nope.shape
    if heads == padded:
        return side_by_side(q_nope, q_rope)
    q = q_nope.new_zeros((rows, padded, LATENT + ROPE))
    q[:, :heads, :LATENT] = q_nope
    q[:, :heads, LATENT:] = q_rope
    return q


def zero_dead_rows(out: torch.Tensor, topk_slots: torch.Tensor) -> torch.Tensor:
    """`out` [T, H, C] with zeros, written into it, where a row of slots [T, topk] has none."""
    if out.is_cuda:
        from sglang.srt.layers.attention.nsa.sparse_mla_triton import zero_dead_rows

        zero_dead_rows(out, topk_slots)
        return out
    return out.masked_fill_((topk_slots[:, 0] < 0)[:, None, None], 0.0)


class FlashMLASparse:
    """`sparse_mla` over FlashMLA's sparse prefill kernel, for prefill and decode.

    Heads are padded to a count that the kernel is compiled for. Raises ValueError where it cannot serve the
    model and ImportError where FlashMLA is not installed.
    """

    def __init__(self, dims: AttentionDims, library: FlashMLALibrary | None = None) -> None:
        self.heads = padded_heads(dims)
        self.library = library or load_flashmla()
        logger.info("FlashMLA from %s", self.library.source)

    def prepare(self, metadata: NSAMetadata) -> ReaderState:
        """How many slots each row has, where the library then leaves the others alone."""
        if not self.library.takes_lengths:
            return NO_STATE
        lengths = metadata.nsa_cache_seqlens_int32  # [T], int32; of a graph: refreshed at every replay
        return ReaderState(library=lengths)

    def check_runs(self, device: torch.device) -> None:
        """Raises ImportError where the kernel does not run on the device."""
        q = torch.zeros((1, self.heads, LATENT + ROPE), dtype=torch.bfloat16, device=device)
        slots = torch.zeros((1, TOPK_MULTIPLE), dtype=torch.int32, device=device)
        try:
            self.sparse_mla(q[..., :LATENT], q[..., LATENT:], q[0], slots, 1.0)
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise ImportError(f"{self.library.source} does not run on {device}: {error}") from error

    def sparse_mla(
        self,
        q_nope: torch.Tensor,  # [T, H, 512], bfloat16
        q_rope: torch.Tensor,  # [T, H, 64]
        kv_buffer: torch.Tensor,  # [slots, 576]
        topk_slots: torch.Tensor,  # [T, topk], int32: those that count first, then -1, as FlashMLA wants
        softmax_scale: float,
        reader: ReaderState = NO_STATE,
    ) -> torch.Tensor:
        """As `sparse_mla.sparse_mla`: mixed latents [T, H, 512]; zeros for a row without any slot."""
        rows, heads, _ = q_nope.shape
        if rows == 0:
            return torch.zeros_like(q_nope)
        lengths = {} if reader.library is None else {"topk_length": reader.library}
        out = self.library.sparse_fwd(
            padded_query(q_nope, q_rope, self.heads),
            kv_buffer[:, None],
            topk_slots[:, None],
            softmax_scale,
            LATENT,
            **lengths,
        )[0]
        return zero_dead_rows(out[:, :heads], topk_slots)


class FlashMLAKV:
    """`sparse_mla` over FlashMLA's decode kernel and a cache in FP8, for prefill and decode.

    Raises as FlashMLASparse does.
    """

    def __init__(
        self, dims: AttentionDims, device: torch.device, library: FlashMLALibrary | None = None
    ) -> None:
        self.heads = padded_heads(dims)
        self.topk, self.device = dims.index_topk, device
        self.library = library or load_flashmla(with_decode=True)
        if self.library.decode is None:
            raise ImportError(f"{self.library.source} has no decode kernel with the arguments of sgl-kernel")
        self.rows_state = functools.lru_cache(maxsize=STATES_KEPT)(self._rows_state)
        logger.info("FlashMLA from %s", self.library.source)

    def prepare(self, metadata: NSAMetadata) -> ReaderState:
        """Every row counts as topk keys, so the schedule depends on the number of rows alone."""
        rows = metadata.nsa_seqlens_expanded.shape[0]
        return self.rows_state(rows) if rows else NO_STATE

    def _rows_state(self, rows: int) -> ReaderState:
        lengths = torch.full((rows,), self.topk, dtype=torch.int32, device=self.device)
        schedule = self.library.decode_metadata(lengths, self.heads, 1, self.heads, True, self.topk)
        return ReaderState(NSAFlashMLAMetadata(*schedule), library=lengths)

    def sparse_mla(
        self,
        q_nope: torch.Tensor,  # [T, H, 512], bfloat16
        q_rope: torch.Tensor,  # [T, H, 64]
        kv_buffer: torch.Tensor,  # [slots, 656], uint8: `fp8_kv.py`; slots is a multiple of 64
        topk_slots: torch.Tensor,  # [T, topk], int32: those that count first, then -1, as FlashMLA wants
        softmax_scale: float,
        reader: ReaderState = NO_STATE,
    ) -> torch.Tensor:
        """As `sparse_mla.sparse_mla`: mixed latents [T, H, 512]; zeros for a row without any slot."""
        rows, heads, _ = q_nope.shape
        if rows == 0:
            return torch.zeros_like(q_nope)
        out = self.library.decode(
            padded_query(q_nope, q_rope, self.heads)[:, None],
            kv_buffer.view(torch.float8_e4m3fn).view(-1, PAGE, 1, kv_buffer.shape[1]),
            LATENT,
            reader.library,
            topk_slots.new_empty((rows, 0)),  # no block table: the slots say it all
            softmax_scale,
            False,  # causal
            reader.flashmla_metadata.flashmla_metadata,
            reader.flashmla_metadata.num_splits,
            True,  # FP8
            topk_slots[:, None],
        )[0]
        return zero_dead_rows(out[:, 0, :heads], topk_slots)
