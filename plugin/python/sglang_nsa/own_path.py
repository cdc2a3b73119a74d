"""SGLang's own path over private state: what the metadata must be.

A shadow is a shallow copy of a multi-step wrapper and of some of its backends. SGLang's own methods run on it
and allocate, plan and refresh metadata that no captured graph reads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from .family import Installed


class Batch(SimpleNamespace):
    """What SGLang's methods read of a ForwardBatch; anything else is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return


class DraftInput:
    """What SGLang's methods ask of a draft batch's `spec_info`."""

    @staticmethod
    def is_draft_input() -> bool:
        return True


def decode_batch(
    seq_lens: torch.Tensor,  # [bs], int32 or int64
    req_pool_indices: torch.Tensor,  # [bs], int64
    seq_lens_cpu: torch.Tensor | None,  # [bs], int32 or int64
    forward_mode: Any,
    spec_info: Any = DraftInput,
) -> Batch:
    return Batch(
        batch_size=seq_lens.shape[0],
        seq_lens=seq_lens,
        req_pool_indices=req_pool_indices,
        seq_lens_cpu=seq_lens_cpu,
        seq_lens_sum=None if seq_lens_cpu is None else int(seq_lens_cpu.sum()),
        positions=seq_lens,  # of which planning wants the number
        forward_mode=forward_mode,
        spec_info=spec_info,
    )


def narrowed(wrapper: Any, backends: Sequence[Any]) -> Any:
    """The wrapper as it would be with these backends alone: SGLang's loops then touch no other."""
    view = copy.copy(wrapper)
    view.attn_backends = list(backends)
    view.speculative_num_steps = len(backends) + 1
    return view


class Shadow:
    """Copies of the backends `indices`, with graph state of their own."""

    def __init__(self, installed: Installed, wrapper: Any, indices: Sequence[int]) -> None:
        self.installed = installed
        self.backends = [copy.copy(wrapper.attn_backends[i]) for i in indices]
        self.wrapper = narrowed(wrapper, self.backends)

    def init_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.installed.init_state(self.wrapper, max_bs, max_num_tokens)

    def capture(self, batch: Any) -> None:
        """Plans the batch's size over copies of its tensors: planning may keep the lengths it is given."""
        self.installed.capture(
            self.wrapper,
            decode_batch(
                batch.seq_lens.clone(),
                batch.req_pool_indices.clone(),
                None if batch.seq_lens_cpu is None else batch.seq_lens_cpu.clone(),
                batch.forward_mode,
                batch.spec_info,
            ),
        )

    def replay(self, batch: Any, bs: int) -> None:
        self.installed.replay(self.wrapper, batch, bs)

    def refresh(self, batch: Any, bs: int) -> None:
        self.installed.refresh(self.wrapper, batch, bs)

    def metadata(self, index: int, bs: int) -> Any:
        return self.backends[index].decode_cuda_graph_metadata[bs]
