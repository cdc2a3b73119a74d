"""Whether the fused copy leaves what mini-sglang's own copies do: tried before it takes their place."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from .fields import ReplayBuffers
from .fused_replay import FusedReplay


def differing(buffers: ReplayBuffers, replay: FusedReplay) -> list[str]:
    """Tensors in which the two leave something else; everything is as it was afterwards. Reads the device."""
    tensors = {
        f"{type(holder).__name__}.{name}": value
        for holder in map(buffers.holder, dict.fromkeys(field.holder for field in buffers.fields))
        for name, value in vars(holder).items()
        if isinstance(value, torch.Tensor) and name != "logits"
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    batch, results = probe_batch(buffers), []
    for copy in (_own_copies(buffers), replay.copy):
        copy(batch)
        results.append({name: tensor.clone() for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            tensor.copy_(before[name])
    own, ours = results
    return [name for name in tensors if not torch.equal(own[name], ours[name])]


def _own_copies(buffers: ReplayBuffers) -> Callable[[Any], None]:
    def copy(batch: Any) -> None:
        type(buffers.runner.buffer).copy_from(buffers.runner.buffer, batch)
        if buffers.attention is not None:
            type(buffers.attention).prepare_for_replay(buffers.attention, batch)

    return copy


def probe_batch(buffers: ReplayBuffers) -> Any:
    """A batch of the largest captured size; no two of its tensors have a value in common."""
    bs = max(buffers.runner.graph_bs_list)
    reqs = [None] * bs
    batch: Any = SimpleNamespace(reqs=reqs, padded_reqs=reqs, size=bs, padded_size=bs)
    if buffers.attention is not None:
        from minisgl.attention.fa import FAMetadata

        tensors = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "page_table"))
        batch.attn_metadata = FAMetadata(**tensors, max_seqlen_k=1, max_seqlen_q=1)
    for number, field in enumerate(buffers.fields):
        tensor = buffers.tensor(field)
        shape = (bs, min(tensor.shape[1], 7)) if field.is_table else (bs + field.extra,)
        values = torch.arange(torch.Size(shape).numel(), device=tensor.device, dtype=torch.int32)
        owner, _, name = field.source.rpartition(".")
        setattr(
            getattr(batch, owner) if owner else batch, name, (values + 1_000_000 * (number + 1)).view(shape)
        )
    return batch
