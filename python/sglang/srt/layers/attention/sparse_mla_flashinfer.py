"""Sparse MLA decode with FlashInfer's paged MLA kernel (https://docs.flashinfer.ai): pages of one slot.

A row's pages are its selected slots. FlashInfer divides the work over the SMs on the host, from the lengths;
a captured graph cannot do that. So the division is fixed at capture, as if every row had topk slots, and the
bounds of each piece are cut to the row's real length on the device, whenever the lengths change: a piece past
the end is empty, which the kernel knows (since 0.6.11, in its "fa2" form).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from sglang.srt.layers.attention.nsa.dims import AttentionDims
from sglang.srt.layers.attention.nsa.metadata import NSAMetadata
from sglang.srt.layers.attention.nsa.schedules import NO_STATE, LengthSchedule, ReaderState
from sglang.srt.libraries.flashinfer import load_flashinfer

LATENT, ROPE = 512, 64  # the dimensions that FlashInfer's MLA is made for
WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends, for the partial results of split rows
PLANS_KEPT = 32  # of eager passes; a captured graph keeps its own

# Where FlashInfer's plan says that its arrays lie in the workspace: MLAPlanInfo, in the order of its fields.
_PLAN_FIELDS = 18
_KV_INDPTR, _KV_LEN, _KV_START, _KV_END, _WORK_INDPTR = 3, 11, 13, 14, 15
_NUM_CLUSTERS = 1


@dataclass(frozen=True)
class WorkBounds:
    """FlashInfer's pieces of work: which row's, and between which of the row's slots. All [works], int32."""

    row: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor  # where the row has topk slots

    def cut(self, lengths: torch.Tensor) -> torch.Tensor:
        """The length of each piece's row, and where the piece then ends: [2, works], int32."""
        length = lengths.index_select(0, self.row)
        return torch.stack((length, torch.minimum(self.end, length)))


@dataclass(frozen=True)
class FlashInferPlan:
    """FlashInfer's plan for a number of rows, made once and used by every backend in turn."""

    run: Callable[..., torch.Tensor]  # (q_nope, q_rope, latents, rope keys) -> [rows, H, 512]
    kv_indices: torch.Tensor  # [rows * topk], int32: the slots, read by the kernel
    kv_bounds: torch.Tensor  # [2, works], int32: a view of the plan, lengths and ends
    bounds: WorkBounds


@dataclass(frozen=True)
class FlashInferState:
    """What the kernel is called with for one backend's rows."""

    plan: FlashInferPlan
    lengths: torch.Tensor  # [rows], int32: slots of each row, kept up to date as metadata


class FlashInferSparseMLA:
    """`sparse_mla` by FlashInfer, for passes with a fixed number of rows: decode, verify, draft-extend.

    Raises ImportError where FlashInfer is not installed or its kernel cannot be built (it is compiled at the
    first use), and ValueError where it cannot serve the model.
    """

    # Beyond a row's slots the kernel's indices must still be those of pages that exist: 0, the padding's.
    padding_slot = 0

    def __init__(self, dims: AttentionDims, device: torch.device, mla: ModuleType | None = None) -> None:
        dims.require("flashinfer", kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, dtype=torch.bfloat16)
        self.mla = mla or load_flashinfer("mla")
        self.dims, self.topk, self.device = dims, dims.index_topk, device
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.rows_plan = functools.lru_cache(maxsize=PLANS_KEPT)(self._plan_rows)
        try:
            self.rows_plan(1)
        except (RuntimeError, OSError) as error:
            raise ImportError(f"flashinfer's MLA kernel cannot be built or planned: {error}") from error

    def prepare(self, metadata: NSAMetadata) -> ReaderState:
        """FlashInfer's plan for the number of rows, and the bounds that follow the lengths."""
        if metadata.shape.rows == 0:
            return ReaderState()
        rows_plan, lengths = self.rows_plan(metadata.shape.rows), metadata.nsa_cache_seqlens_int32
        schedule = LengthSchedule.create(
            "flashinfer_kv_bounds", metadata, lambda of: rows_plan.bounds.cut(of.nsa_cache_seqlens_int32)
        )
        return ReaderState(library=FlashInferState(rows_plan, lengths), schedules=(schedule,))

    def sparse_mla(
        self,
        q_nope: torch.Tensor,  # [T, H, 512], bfloat16
        q_rope: torch.Tensor,  # [T, H, 64]
        kv_buffer: torch.Tensor,  # [slots, 576]
        topk_slots: torch.Tensor,  # [T, topk], int32: as many as the metadata says, then padding_slot
        softmax_scale: float,
        reader: ReaderState = NO_STATE,
    ) -> torch.Tensor:
        """As `sparse_mla.sparse_mla`: mixed latents [T, H, 512]; zeros for a row without any slot."""
        if q_nope.shape[0] == 0:
            return torch.zeros_like(q_nope)
        state: FlashInferState = reader.library
        plan = state.plan
        assert softmax_scale == self.dims.softmax_scale  # it is part of the plan
        plan.kv_indices.copy_(topk_slots.view(-1))
        plan.kv_bounds.copy_(reader.schedules[0].target)
        out = plan.run(
            q_nope.contiguous(),
            q_rope.contiguous(),
            kv_buffer[:, None, :LATENT],
            kv_buffer[:, None, LATENT:],
        )
        return out.masked_fill_((state.lengths == 0)[:, None, None], 0.0)

    def _plan_rows(self, rows: int) -> FlashInferPlan:
        def ints(n: int) -> torch.Tensor:
            return torch.zeros(n, dtype=torch.int32, device=self.device)

        indptr = torch.arange(rows + 1, dtype=torch.int32)  # on the host, where the plan is made
        wrapper = self.mla.BatchMLAPagedAttentionWrapper(
            self.workspace,
            use_cuda_graph=True,
            qo_indptr=ints(rows + 1),
            kv_indptr=ints(rows + 1),
            kv_indices=ints(rows * self.topk),
            kv_len_arr=ints(rows),
            backend="fa2",
        )
        kv_indices = ints(rows * self.topk)
        wrapper.plan(
            indptr,
            indptr * self.topk,
            kv_indices,
            torch.full((rows,), self.topk, dtype=torch.int32),
            self.dims.num_attention_heads,
            LATENT,
            ROPE,
            1,  # page size
            False,  # causal: a row attends to all its slots
            self.dims.softmax_scale,
            self.dims.dtype,
            self.dims.dtype,
        )
        # What the wrapper keeps to itself in 0.6.11: the buffer of indices, the plan and its workspace.
        bounds, kv_bounds = read_plan(
            [int(n) for n in wrapper._plan_info], wrapper._int_workspace_buffer, rows, self.topk
        )
        return FlashInferPlan(wrapper.run, wrapper._kv_indices_buf, kv_bounds, bounds)


def read_plan(
    plan_info: list[int], workspace: torch.Tensor, rows: int, topk: int
) -> tuple[WorkBounds, torch.Tensor]:
    """The pieces of work of a plan of `rows` rows of `topk` slots, and its [2, works] view of their bounds.

    The layout of the plan is FlashInfer's own, so everything in it that can be known is checked: raises
    RuntimeError where it is not what it was.
    """
    if len(plan_info) != _PLAN_FIELDS:
        raise RuntimeError(f"flashinfer's MLA plan has {len(plan_info)} fields, expected {_PLAN_FIELDS}")
    ints = workspace.view(torch.int32)

    def array(field: int, size: int) -> torch.Tensor:
        first = plan_info[field] // 4
        return ints[first : first + size]

    works = int(array(_WORK_INDPTR, plan_info[_NUM_CLUSTERS] + 1)[-1])
    kv_indptr, length = array(_KV_INDPTR, works), array(_KV_LEN, works)
    start, end = array(_KV_START, works), array(_KV_END, works)
    row = kv_indptr // topk
    covered = torch.zeros(rows, dtype=torch.int64, device=ints.device)
    ok = works > 0 and bool(((row >= 0) & (row < rows)).all())
    if ok:
        covered.index_add_(0, row, (end - start).long())
        tiles = covered // topk  # each tile of heads covers every slot once
        ok = bool(
            (kv_indptr % topk == 0).all()
            and (length == topk).all()
            and (start >= 0).all()
            and (start < end).all()
            and (end <= topk).all()
            and (covered == tiles * topk).all()
            and (tiles > 0).all()
        )
    if not ok:
        raise RuntimeError("flashinfer's MLA plan is not laid out as in 0.6.11")
    gap = (plan_info[_KV_END] - plan_info[_KV_LEN]) // 4
    kv_bounds = ints[plan_info[_KV_LEN] // 4 :].as_strided((2, works), (gap, 1))
    return WorkBounds(row.clone(), start.clone(), end.clone()), kv_bounds
