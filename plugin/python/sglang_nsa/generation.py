"""The metadata of one captured batch size: planned over static inputs, written by one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .derived import Stage, derived_stages
from .family import Installed
from .fields import MetadataForm
from .nsa.metadata import NSAMetadata
from .nsa.metadata_generators import Destination, FusedGenerator
from .nsa.nsa_backend_mtp_precompute import MetadataInputs


class Generation:
    """Brings `sets`, the metadata of one batch size of `backends`, up to date. Can be captured."""

    def __init__(
        self,
        installed: Installed,
        form: MetadataForm,
        backends: Sequence[Any],
        sets: Sequence[Any],
        batch: Any,
        whole_pages: bool = False,
    ) -> None:
        """`batch` holds the static inputs at their captured size; `whole_pages`: as holds_whole_pages says.
        Raises ImportError without the kernel library, UnsupportedError or RuntimeError where a tensor is not
        what the kernels take."""
        self.seq_lens = batch.seq_lens  # [bs], int32 or int64
        self.req_pool_indices = batch.req_pool_indices  # [bs], int64
        req_to_token = backends[0].req_to_token  # [pool, width], int32
        views = [_fitted(form.view(m, self.seq_lens), req_to_token) for m in sets]
        inputs = MetadataInputs(
            views[0].shape, self.seq_lens, self.req_pool_indices, req_to_token, whole_pages=whole_pages
        )
        offsets = [form.seqlens_offset(backend) for backend in backends]
        self._generator = FusedGenerator(inputs, [Destination(*pair) for pair in zip(views, offsets)])
        self.on_gpu = self.seq_lens.device.type == "cuda"
        self._derived: list[Stage] = []
        if form.fields.derived:
            self._derived = derived_stages(installed, backends[0], sets)

    def run(self) -> None:
        self._generator.run(-1)
        for stage in self._derived:
            stage()

    def as_graph(self) -> Stage:
        """All of `run` as one launch: replaying a small graph costs the host less than one operator."""
        if not self.on_gpu:
            return self.run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # whatever is compiled or allocated at first use
            self.run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.run()
        self._graph = graph
        return graph.replay

    def reads(self, batch: Any) -> bool:
        """Whether the static inputs hold the batch's values. Reads the device."""
        bs = batch.seq_lens.shape[0]
        return bool(
            (self.seq_lens[:bs] == batch.seq_lens).all()
            & (self.req_pool_indices[:bs] == batch.req_pool_indices).all()
        )


def _fitted(view: NSAMetadata, req_to_token: torch.Tensor) -> NSAMetadata:
    """Tables no wider than the token table: the columns beyond it can hold nothing."""
    width = min(view.shape.width, req_to_token.shape[1])
    slots, pages = view.page_table_1, view.real_page_table
    return replace(
        view,
        shape=replace(view.shape, width=width),
        page_table_1=None if slots is None else slots[:, :width],
        real_page_table=None if pages is None else pages[:, : -(-width // view.shape.page_size)],
    )
