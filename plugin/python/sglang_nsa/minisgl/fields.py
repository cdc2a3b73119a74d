"""The static inputs of mini-sglang's decode graphs as data. Whatever plans, copies, generates, tries or
measures them walks these tables; the extents are the core's."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from ..nsa.metadata import Extent


@dataclass(frozen=True)
class ReplayInput:
    """One static tensor, int32: where it lies, where a batch has its new values, how much of it is live."""

    name: str  # in the fused copy's arguments
    holder: str  # "runner": the graph runner's buffer; "attention": the decode backend's capture data
    buffer: str  # attribute of the holder
    source: str  # attribute path of a batch
    generated: str  # what the kernels that generate it call it
    extent: Extent

    @property
    def is_table(self) -> bool:
        return self.extent is Extent.PAGED_TABLE

    @property
    def extra(self) -> int:
        """Live elements beyond the batch size."""
        return int(self.extent is Extent.REQS_PREFIX)


INPUTS = (  # of every backend
    ReplayInput("input_ids", "runner", "input_ids", "input_ids", "input_ids", Extent.REQS),
    ReplayInput("out_loc", "runner", "out_loc", "out_loc", "out_cache_loc", Extent.REQS),
    ReplayInput("positions", "runner", "positions", "positions", "positions", Extent.REQS),
)
ATTENTION = (  # of FlashAttentionBackend; columns of the table count pages
    ReplayInput(
        "cu_seqlens_k",
        "attention",
        "cu_seqlens_k",
        "attn_metadata.cu_seqlens_k",
        "cu_seqlens_k",
        Extent.REQS_PREFIX,
    ),
    ReplayInput(
        "seq_lens", "attention", "seq_lens", "attn_metadata.cache_seqlens", "cache_seqlens", Extent.REQS
    ),
    ReplayInput(
        "page_table",
        "attention",
        "page_table",
        "attn_metadata.page_table",
        "real_page_table",
        Extent.PAGED_TABLE,
    ),
)
# What the holders have besides: outputs, what is constant, what no decode graph reads.
KNOWN = {
    "runner": frozenset({"logits", *(field.buffer for field in INPUTS)}),
    "attention": frozenset({"cu_seqlens_q", "positions", *(field.buffer for field in ATTENTION)}),
}


@dataclass(frozen=True)
class ReplayBuffers:
    """The static inputs of one graph runner."""

    runner: Any  # GraphRunner
    attention: Any | None  # the FlashAttentionBackend that decodes, if one does

    @property
    def fields(self) -> tuple[ReplayInput, ...]:
        return INPUTS if self.attention is None else INPUTS + ATTENTION

    def holder(self, kind: str) -> Any:
        return self.runner.buffer if kind == "runner" else self.attention.capture

    def tensor(self, field: ReplayInput) -> torch.Tensor:
        return getattr(self.holder(field.holder), field.buffer)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the name of the field."""
        return {field.name: self.tensor(field) for field in self.fields}

    def generated(self, fields: tuple[ReplayInput, ...]) -> dict[str, torch.Tensor]:
        """By the name that the kernels give them."""
        return {field.generated: self.tensor(field) for field in fields}

    def sources(self) -> attrgetter:
        """Takes a batch, returns its new values in the order of the fields."""
        return attrgetter(*(field.source for field in self.fields))

    def unknown(self) -> list[str]:
        """Tensors that a holder has and these tables do not."""
        kinds = dict.fromkeys(field.holder for field in self.fields)
        return [
            f"{type(self.holder(kind)).__name__}.{name}"
            for kind in kinds
            for name, value in vars(self.holder(kind)).items()
            if isinstance(value, torch.Tensor) and name not in KNOWN[kind]
        ]
