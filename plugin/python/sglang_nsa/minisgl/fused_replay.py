"""MINISGL_USE_FUSED_COPY=1: a batch's new tensors into the static inputs by one launch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

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


def differing(buffers: ReplayBuffers, replay: FusedReplay) -> list[str]:
    """Fields in which mini-sglang's own copies and ours leave something else, on a probe batch; everything is
    as it was afterwards. Reads the device: for start-up."""
    tensors = [buffers.holder(kind) for kind in dict.fromkeys(f.holder for f in buffers.fields)]
    tensors = {
        f"{type(holder).__name__}.{name}": value
        for holder in tensors
        for name, value in vars(holder).items()
        if isinstance(value, torch.Tensor) and name != "logits"
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    batch = probe_batch(buffers)
    results = []
    for copy in (_own_copies(buffers), replay):
        copy(batch)
        results.append({name: tensor.clone() for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            tensor.copy_(before[name])
    return [name for name in tensors if not torch.equal(results[0][name], results[1][name])]


def _own_copies(buffers: ReplayBuffers) -> Any:
    def copy(batch: Any) -> None:
        type(buffers.runner.buffer).copy_from(buffers.runner.buffer, batch)
        if buffers.attention is not None:
            type(buffers.attention).prepare_for_replay(buffers.attention, batch)

    return copy


def probe_batch(buffers: ReplayBuffers) -> Any:
    """A batch of the largest captured size, with values that no buffer holds."""
    bs = max(buffers.runner.graph_bs_list)
    reqs = [None] * bs
    batch: Any = SimpleNamespace(reqs=reqs, padded_reqs=reqs, size=bs, padded_size=bs)
    if buffers.attention is not None:
        from minisgl.attention.fa import FAMetadata

        unused = {"cu_seqlens_q": None, "max_seqlen_k": 1, "max_seqlen_q": 1}
        names = ("cu_seqlens_k", "cache_seqlens", "page_table")
        batch.attn_metadata = FAMetadata(**unused, **dict.fromkeys(names))
    for number, (field, tensor) in enumerate(zip(buffers.fields, buffers.tensors().values(), strict=True)):
        cols = min(tensor.shape[-1], 7) if field.is_table else bs + field.extra
        shape = (bs, cols) if field.is_table else (cols,)
        values = torch.arange(shape[0] * shape[-1] if len(shape) == 2 else cols, device=tensor.device)
        owner, _, name = field.source.rpartition(".")
        setattr(getattr(batch, owner) if owner else batch, name, _distinct(values, number, shape))
    return batch


def _distinct(values: torch.Tensor, number: int, shape: tuple[int, ...]) -> torch.Tensor:
    return (values + 1_000_000 * (number + 1)).to(torch.int32).view(shape)
