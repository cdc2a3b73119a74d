"""MINISGL_USE_FUSED_COPY=1: a batch's new tensors into the static inputs by one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..nsa.kernels import load_kernels
from .fields import ReplayBuffers


class FusedReplay:
    """Stands in for `GraphCaptureBuffer.copy_from` and, where FlashAttention decodes, for its
    `prepare_for_replay`: the runner calls the first, then the second, and the last of them copies all."""

    def __init__(self, buffers: ReplayBuffers) -> None:
        """Raises ImportError where the kernel library does not load."""
        self.buffers = buffers
        self.copy = _bind(buffers)  # takes a padded batch

    def install(self) -> None:
        """From now on the runner's replays come here."""
        if self.buffers.attention is None:
            self.buffers.runner.buffer.copy_from = self.copy
        else:
            self.buffers.runner.buffer.copy_from = _leave_to_the_backend
            self.buffers.attention.prepare_for_replay = self.copy


def _bind(buffers: ReplayBuffers) -> Callable[[Any], None]:
    """One Python call around the operator: it runs once a step."""
    tensors, sources = buffers.tensors(), buffers.sources()
    kernels = load_kernels(tensors["input_ids"].device.type)
    fields = [kernels.ReplayField(f.name, tensors[f.name], f.extra) for f in buffers.fields]
    copy = kernels.bind_replay_copy(kernels.ReplayCopyPlan(fields))
    table = next((k for k, field in enumerate(buffers.fields) if field.is_table), None)

    def copy_inputs(batch: Any) -> None:
        copy(len(batch.padded_reqs), 0, *sources(batch))

    def copy_inputs_and_table(batch: Any) -> None:
        new = sources(batch)
        copy(len(batch.padded_reqs), new[table].size(1), *new)

    return copy_inputs if table is None else copy_inputs_and_table


def _leave_to_the_backend(batch: Any) -> None:
    """prepare_for_replay comes next, and copies what copy_from would, too."""
