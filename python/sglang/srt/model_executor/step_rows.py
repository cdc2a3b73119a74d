"""The rows of a decode step: D of each request, from its committed length on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from sglang.srt.layers.rotary import RotaryEmbedding
from sglang.srt.layers.triton_kernels import runs_triton
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool


@dataclass(frozen=True)
class StepRows:
    """Where the rows are. The drafts, the verification and the draft-extend run over the same ones."""

    positions: torch.Tensor  # [bs, D], int64
    slots: torch.Tensor  # [bs, D], int64: of the cache; 0 for rows that do not count
    rotation: torch.Tensor  # [bs, D, 1, rope / 2], complex64

    def column(self, i: int) -> StepRows:
        """Row i of every request: one draft step."""
        at = slice(i, i + 1)
        return StepRows(self.positions[:, at], self.slots[:, at], self.rotation[:, at])


class MakeRows(Protocol):
    def __call__(
        self,
        requests: torch.Tensor,  # [bs], int32
        seq_lens: torch.Tensor,  # [bs], int32
        accept_lens: torch.Tensor | None = None,  # [bs], int32: only so many rows keep their slots; None: all
    ) -> StepRows: ...


def rows_maker(pool: ReqToTokenPool, rotary: RotaryEmbedding, rows: int, device: torch.device) -> MakeRows:
    """What makes the D = `rows` rows of a batch; in one launch where Triton runs."""
    if runs_triton(device):
        from sglang.srt.layers.triton_kernels.step_rows import step_rows

        table = rotary.table(pool.max_context_len)

        def make_at_once(
            requests: torch.Tensor, seq_lens: torch.Tensor, accept_lens: torch.Tensor | None = None
        ) -> StepRows:
            return StepRows(*step_rows(requests, seq_lens, pool.req_to_token, table, rows, accept_lens))

        return make_at_once

    numbers = torch.arange(rows, device=device)

    def make(
        requests: torch.Tensor, seq_lens: torch.Tensor, accept_lens: torch.Tensor | None = None
    ) -> StepRows:
        positions = seq_lens.long()[:, None] + numbers
        slots = pool.req_to_token[requests.long()[:, None], positions].long()
        if accept_lens is not None:
            slots = slots * (numbers < accept_lens[:, None])
        return StepRows(positions, slots, rotary(positions.flatten()).unflatten(0, positions.shape))

    return make
