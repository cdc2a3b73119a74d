"""The rows of a decode step: D of each request, from its committed length on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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

    def accepted(self, accept_lens: torch.Tensor, numbers: torch.Tensor) -> StepRows:
        """The same rows, of which only the first accept_lens [bs] keep their slots; `numbers` [D] are
        0 .. D - 1."""
        return replace(self, slots=self.slots * (numbers < accept_lens[:, None]))


# (requests [bs] int32, seq_lens [bs] int32) -> rows
MakeRows = Callable[[torch.Tensor, torch.Tensor], StepRows]


def rows_maker(pool: ReqToTokenPool, rotary: RotaryEmbedding, rows: int, device: torch.device) -> MakeRows:
    """What makes the D = `rows` rows of a batch; in one launch where Triton runs."""
    if runs_triton(device):
        from sglang.srt.layers.triton_kernels.step_rows import step_rows

        table = rotary.table(pool.max_context_len)
        return lambda requests, lens: StepRows(*step_rows(requests, lens, pool.req_to_token, table, rows))

    numbers = torch.arange(rows, device=device)

    def make(requests: torch.Tensor, seq_lens: torch.Tensor) -> StepRows:
        positions = seq_lens.long()[:, None] + numbers
        slots = pool.req_to_token[requests.long()[:, None], positions].long()
        return StepRows(positions, slots, rotary(positions.flatten()).unflatten(0, positions.shape))

    return make
