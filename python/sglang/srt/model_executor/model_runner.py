"""A model with its cache and its attention backend, and the forward passes that the workers make of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.step_rows import StepRows


@dataclass(frozen=True)
class ExtendBatch:
    """The chunks of one prefill pass: what the target and the NextN layer have in common."""

    input_ids: torch.Tensor  # [T], int64
    positions: torch.Tensor  # [T], int64
    row_requests: torch.Tensor  # [T], int64
    out_cache_loc: torch.Tensor  # [T], int64
    req_pool_indices: torch.Tensor  # [bs], int32
    seq_lens: torch.Tensor  # [bs], int32: after the pass
    last_rows: torch.Tensor  # [bs], int64: of each chunk
    seq_lens_cpu: list[int]

    @classmethod
    def create(
        cls,
        pool: ReqToTokenPool,
        indices: Sequence[int],
        prefix_lens: Sequence[int],
        tokens: Sequence[Sequence[int]],
    ) -> ExtendBatch:
        ends = [p + len(chunk) for p, chunk in zip(prefix_lens, tokens)]
        lens = torch.tensor([len(chunk) for chunk in tokens])
        requests = torch.tensor(indices)
        token_ids = array("q")
        for chunk in tokens:
            token_ids.extend(chunk)
        input_ids, positions, row_requests, requests, seq_lens, last_rows = to_device(
            torch.frombuffer(token_ids, dtype=torch.int64),  # an eighth of what torch.tensor(list) takes
            torch.cat([torch.arange(p, end) for p, end in zip(prefix_lens, ends)]),
            requests.repeat_interleave(lens),
            requests,
            torch.tensor(ends),
            lens.cumsum(0) - 1,
            device=pool.req_to_token.device,
        )
        return cls(
            input_ids=input_ids,
            positions=positions,
            row_requests=row_requests,
            out_cache_loc=pool.req_to_token[row_requests, positions].long(),
            req_pool_indices=requests.int(),
            seq_lens=seq_lens.int(),
            last_rows=last_rows,
            seq_lens_cpu=ends,
        )


def to_device(*columns: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Vectors of one dtype in one copy, from pinned memory: nobody waits for what the device does."""
    sizes = [column.shape[0] for column in columns]
    host = torch.empty(sum(sizes), dtype=columns[0].dtype, pin_memory=device.type == "cuda")
    torch.cat(columns, out=host)
    return host.to(device, non_blocking=True).split(sizes)


class ModelRunner:
    """Forward passes of one model."""

    def __init__(
        self,
        model: torch.nn.Module,
        token_to_kv_pool: MLATokenToKVPool,
        req_to_token_pool: ReqToTokenPool,
        attn_backend: AttentionBackend,
    ) -> None:
        self.model = model
        self.token_to_kv_pool = token_to_kv_pool
        self.req_to_token_pool = req_to_token_pool
        self.attn_backend = attn_backend

    def extend(
        self,
        batch: ExtendBatch,
        input_ids: torch.Tensor,  # [T], int64
        hidden_states: torch.Tensor | None = None,  # [T, hidden]
        last_rows: torch.Tensor | None = None,  # [bs], int64
    ) -> torch.Tensor:
        """One eager prefill pass. Returns the hidden states [T, hidden], or of `last_rows` alone."""
        forward_batch = ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=len(batch.seq_lens_cpu),
            input_ids=input_ids,
            positions=batch.positions,
            out_cache_loc=batch.out_cache_loc,
            req_pool_indices=batch.req_pool_indices,
            seq_lens=batch.seq_lens,
            seq_lens_cpu=batch.seq_lens_cpu,
            row_requests=batch.row_requests,
            last_rows=last_rows,
            hidden_states=hidden_states,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool=self.token_to_kv_pool,
            attn_backend=self.attn_backend,
        )
        self.attn_backend.init_forward_metadata(forward_batch)
        return self.model.forward(forward_batch)

    def rows_batch(
        self,
        mode: ForwardMode,
        req_pool_indices: torch.Tensor,  # [bs], int32
        seq_lens: torch.Tensor,  # [bs], int32
        input_ids: torch.Tensor,  # [bs, rows], int64
        rows: StepRows,
        *,
        attn_backend: AttentionBackend | None = None,
        hidden_states: torch.Tensor | None = None,  # [bs * rows, hidden]
        accept_lens: torch.Tensor | None = None,  # [bs], int32: rows from there on do not count
    ) -> ForwardBatch:
        """A batch with a fixed number of rows a request, as decode, verify and draft-extend have."""
        return ForwardBatch(
            forward_mode=mode,
            batch_size=req_pool_indices.shape[0],
            input_ids=input_ids.reshape(-1),
            positions=rows.positions.reshape(-1),
            out_cache_loc=rows.slots.reshape(-1),
            rotation=rows.rotation.flatten(0, 1),
            req_pool_indices=req_pool_indices,
            seq_lens=seq_lens,
            accept_lens=accept_lens,
            hidden_states=hidden_states,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool=self.token_to_kv_pool,
            attn_backend=attn_backend or self.attn_backend,
        )
