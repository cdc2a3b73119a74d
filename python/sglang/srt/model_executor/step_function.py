"""A function of a step together with its attention metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sglang.srt.layers.attention.nsa.metadata import MetadataMode
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs
from sglang.srt.layers.attention.nsa_backend import (
    NativeSparseAttnBackend,
    NativeSparseAttnMultiStepBackend,
)
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.graph_runner import StepInputs

Outputs = TypeVar("Outputs")


@dataclass(frozen=True)
class StepMetadata:
    """Which attention metadata a step's function reads."""

    mode: MetadataMode
    rows_per_req: int
    offsets: Sequence[int]  # what each backend adds to the lengths
    follows_step: bool = False  # its lengths come out of the step itself, so only the graph can generate it

    def inputs(
        self, step: StepInputs, backend: NativeSparseAttnBackend, pool: ReqToTokenPool
    ) -> MetadataInputs:
        extend = self.mode is MetadataMode.DRAFT_EXTEND
        return MetadataInputs(
            shape=backend.config.shape(self.mode, step.bs, self.rows_per_req),
            seq_lens=step.extend_seq_lens if extend else step.seq_lens,
            req_pool_indices=step.req_pool_indices,
            req_to_token=pool.req_to_token,
            accept_lens=step.accept_lens if extend else None,
            whole_pages=True,  # as every row of the pool has them
        )


class StepFunction(Generic[Outputs]):
    """`body(step, ...)` is the function. Over static inputs it finds its metadata in the graph's buffers;
    over others it initialises the metadata of its own batch."""

    def __init__(
        self,
        name: str,
        body: Callable[..., Outputs],
        backend: NativeSparseAttnBackend | NativeSparseAttnMultiStepBackend,
        metadata: StepMetadata,
    ) -> None:
        self.name = name
        self.body = body
        self.backend = backend
        self.metadata = metadata
        self.checks_replays = backend.config.selection.check_replays
        self.max_len = -1  # of the replay under way; unknown to a captured graph

    def plan(self, inputs: StepInputs, pool: ReqToTokenPool, batch_sizes: Sequence[int]) -> None:
        """Plans the metadata of each batch size over views of the static `inputs`, once for all graphs."""
        backend, metadata = self.backend, self.metadata
        backend.init_cuda_graph_state(
            inputs.bs, metadata.mode, metadata.rows_per_req, metadata.offsets, metadata.follows_step
        )
        for bs in sorted(batch_sizes, reverse=True):
            shape_inputs = metadata.inputs(inputs.view(bs), backend, pool)
            backend.init_forward_metadata_capture_cuda_graph(shape_inputs)

    def refresh(self, bs: int, max_len: int) -> None:
        """Before a replay: what the host launches. `max_len` bounds the row lengths, -1 where unknown."""
        self.max_len = max_len
        self.backend.graph_metadata.replay(bs, max_len)

    def __call__(self, step: StepInputs, *args: Any) -> Outputs:
        if step.is_static:
            self.backend.init_forward_metadata_in_graph(step.bs, self.max_len)
        return self.body(step, *args)

    def check(self, bs: int) -> None:
        """After a replay, where replays are checked: metadata that the graph generated."""
        self.backend.check_after_replay(bs)
