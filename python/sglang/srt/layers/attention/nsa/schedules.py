"""What readers of the metadata, kernels of libraries, need beside it: fixed state, and schedules.

The state is made once for each captured batch size. Its schedules follow the lengths of the rows, so they are
refreshed at every replay, for every backend: a stale one gives wrong output or hangs its reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .metadata import NSAFlashMLAMetadata, NSAMetadata

# DeepGEMM's paged_mqa_logits gives out its work in segments of that many keys.
PAGED_MQA_SEGMENT = 256


@dataclass(frozen=True)
class LengthSchedule:
    """A tensor that a kernel reads, and what it must hold for the lengths of one backend.

    `compute` makes it from metadata of the backend's shape, without reading anything on the host, so that a
    refresh can be captured in a graph.
    """

    name: str
    target: torch.Tensor  # int32, owned by the graph
    compute: Callable[[NSAMetadata], torch.Tensor]  # -> target's shape

    @classmethod
    def create(
        cls, name: str, metadata: NSAMetadata, compute: Callable[[NSAMetadata], torch.Tensor]
    ) -> LengthSchedule:
        """A schedule in a tensor of its own."""
        return cls(name, compute(metadata).clone(), compute)

    def refresh(self, metadata: NSAMetadata) -> None:
        self.target.copy_(self.compute(metadata))


@dataclass(frozen=True)
class ReaderState:
    """What the reader of one backend and batch size is called with, beside the fields."""

    flashmla_metadata: NSAFlashMLAMetadata | None = None
    library: Any = None  # what the library keeps; it does not depend on lengths
    schedules: tuple[LengthSchedule, ...] = ()


NO_STATE = ReaderState()

# Makes the state of one backend for one batch size. Called outside of captures; may read on the host.
Prepare = Callable[["NSAMetadata"], ReaderState]


def paged_mqa_logits_schedule(
    context_lens: torch.Tensor,  # [B] or [B, next_n], int32
    num_sms: int,
) -> torch.Tensor:
    """Which SM scores which keys, as DeepGEMM's `get_paged_mqa_logits_metadata`: [num_sms + 1, 2], int32.

    A request has ceil(len / 256) segments, where len is that of its last row, and that for each atom of two
    rows (an odd row out is an atom, too). All segments in order are divided evenly; row i is the (atom,
    segment) where SM i starts and SM i - 1 ends, so the last row lies behind the last atom.
    """
    lens = context_lens[:, None] if context_lens.dim() == 1 else context_lens
    batch, next_n = lens.shape
    atoms = -(-next_n // 2)  # of one request
    device = context_lens.device
    ranks = torch.arange(num_sms + 1, device=device)
    if batch == 0:
        return torch.zeros((num_sms + 1, 2), dtype=torch.int32, device=device)
    segments = (lens[:, -1].long() + PAGED_MQA_SEGMENT - 1) // PAGED_MQA_SEGMENT  # [B]
    ends = segments.cumsum(0) * atoms
    total = ends[-1]
    starts = ranks * (total // num_sms) + ranks.minimum(total % num_sms)  # [num_sms + 1]
    request = torch.searchsorted(ends, starts, right=True)
    inside = request < batch
    at = request.clamp(max=batch - 1)
    size = segments[at].clamp(min=1)
    offset = (starts - (ends - segments * atoms)[at]) * inside
    return torch.stack((request * atoms + offset // size, offset % size), dim=1).to(torch.int32)


def prepare_paged_mqa(num_sms: int) -> Prepare:
    """DeepGEMM's schedule over the visible keys of every row, each row a request of its own."""

    def prepare(metadata: NSAMetadata) -> ReaderState:
        schedule = LengthSchedule.create(
            "paged_mqa_schedule_metadata",
            metadata,
            lambda of: paged_mqa_logits_schedule(of.nsa_seqlens_expanded, num_sms),
        )
        return ReaderState(schedules=(schedule,))

    return prepare
