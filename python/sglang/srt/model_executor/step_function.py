"""A step's function together with its attention metadata: replayed from a graph, or run eagerly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sglang.srt.layers.attention.nsa.metadata import MetadataMode
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs
from sglang.srt.layers.attention.nsa_backend import (
    NativeSparseAttnBackend,
    NativeSparseAttnMultiStepBackend,
)
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.graph_runner import GraphRunner, StepInputs

Outputs = TypeVar("Outputs")


@dataclass(frozen=True)
class StepMetadata:
    """Which attention metadata a step's function reads."""

    mode: MetadataMode
    rows_per_req: int
    offsets: Sequence[int]  # what each backend adds to the lengths

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
        )


class StepFunction(Generic[Outputs]):
    """`body(step, eager)` is the function: eager, it initialises the metadata of its own batch; otherwise
    it finds the metadata up to date in the graph's buffers."""

    def __init__(
        self,
        name: str,
        body: Callable[[StepInputs, bool], Outputs],
        backend: NativeSparseAttnBackend | NativeSparseAttnMultiStepBackend,
        metadata: StepMetadata,
    ) -> None:
        self.name = name
        self.body = body
        self.backend = backend
        self.metadata = metadata
        self.runner: GraphRunner[Outputs] | None = None
        # Bound at capture, so that nothing stands between a replay and its metadata:
        self._refresh: Callable[[int, int], None] | None = None
        self._check: Callable[[int], None] | None = None  # where replays are checked

    def capture(self, inputs: StepInputs, pool: ReqToTokenPool, batch_sizes: Sequence[int]) -> None:
        """Captures the function over views of the static `inputs`."""
        backend, metadata = self.backend, self.metadata
        backend.init_cuda_graph_state(inputs.bs, metadata.mode, metadata.rows_per_req, metadata.offsets)
        self._refresh = backend.graph_metadata.replay
        self._check = backend.check_after_replay if backend.config.selection.check_replays else None
        views = {bs: inputs.view(bs) for bs in batch_sizes}

        def prepare(bs: int) -> None:
            backend.init_forward_metadata_capture_cuda_graph(metadata.inputs(views[bs], backend, pool))

        def captured(bs: int) -> Outputs:
            backend.init_forward_metadata_in_graph(bs)
            return self.body(views[bs], False)

        self.runner = GraphRunner(self.name, backend.config.device, batch_sizes)
        self.runner.capture(prepare, captured)

    def replay(self, bs: int, max_len: int) -> Outputs:
        """Runs the captured batch size over the static inputs. `max_len` bounds the row lengths."""
        self._refresh(bs, max_len)
        outputs = self.runner.replay(bs)
        if self._check is not None:
            self._check(bs)
        return outputs

    def run(self, step: StepInputs, max_len: int) -> Outputs:
        """Over the static inputs from the graph, over others eagerly."""
        return self.replay(step.bs, max_len) if step.is_static else self.body(step, True)
