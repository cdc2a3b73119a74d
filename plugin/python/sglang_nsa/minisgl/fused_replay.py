"""MINISGL_USE_FUSED_COPY=1: a batch's new tensors into the static inputs by one launch."""

from __future__ import annotations

from typing import Any

from ..nsa.kernels import load_kernels
from .fields import ReplayBuffers


class FusedReplay:
    """Stands in for `GraphCaptureBuffer.copy_from` and, where FlashAttention decodes, for its
    `prepare_for_replay`: the runner calls the first, then the second, and the last of them copies all."""

    def __init__(self, buffers: ReplayBuffers) -> None:
        """Raises ImportError where the kernel library does not load."""
        self.buffers = buffers
        tensors = buffers.tensors()
        kernels = load_kernels(tensors["input_ids"].device.type)
        plan = kernels.ReplayCopyPlan(
            [kernels.ReplayField(f.name, tensors[f.name], f.extra) for f in buffers.fields]
        )
        self._copy = kernels.bind_replay_copy(plan)
        self._sources = buffers.sources()
        tables = [k for k, field in enumerate(buffers.fields) if field.is_table]
        self._table = tables[0] if tables else None

    def __call__(self, batch: Any) -> None:
        sources = self._sources(batch)
        width = 0 if self._table is None else sources[self._table].shape[1]
        self._copy(sources, batch.padded_size, width)

    def install(self) -> None:
        """From now on the runner's replays come here."""
        if self.buffers.attention is None:
            self.buffers.runner.buffer.copy_from = self
        else:
            self.buffers.runner.buffer.copy_from = _leave_to_the_backend
            self.buffers.attention.prepare_for_replay = self


def _leave_to_the_backend(batch: Any) -> None:
    """prepare_for_replay comes next, and copies what copy_from would, too."""
