"""The contract between a model's attention layers, the graph runner and an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True)
class MLAInputs:
    """What one sparse MLA layer hands to its backend: T queries of H heads and K keys, all in the model's
    dtype. The keys are None where the layer has written them to the cache itself."""

    q_nope: torch.Tensor  # [T, H, kv_lora_rank]: absorbed, i.e. already multiplied by W_UK
    q_rope: torch.Tensor  # [T, H, qk_rope_head_dim]
    kv_latent: torch.Tensor | None  # [K, kv_lora_rank]: after kv_a_layernorm
    k_rope: torch.Tensor | None  # [K, qk_rope_head_dim]
    q_index: torch.Tensor | None  # [T, index_n_heads, index_head_dim], rotated; None: nothing is selected
    k_index: torch.Tensor | None  # [K, index_head_dim], normed and rotated
    index_weights: torch.Tensor | None  # [T, index_n_heads], float32, all scales included; None with q_index
    softmax_scale: float


class AttentionBackend(ABC):
    """Metadata of a forward pass, eager or in a captured graph, and the attention that reads it.

    Eager passes call `init_forward_metadata` and then `forward` for each layer. The graph runner calls
    `init_cuda_graph_state` once, `init_forward_metadata_capture_cuda_graph` for each captured batch size
    and, before each replay, `replay` of its `graph_metadata`.
    """

    @abstractmethod
    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Computes the metadata of one eager pass."""

    @abstractmethod
    def selects_keys(self) -> bool:
        """Whether a row of this pass may see more keys than it attends to, so that it needs index queries."""

    @abstractmethod
    def forward(self, layer_id: int, inputs: MLAInputs, forward_batch: ForwardBatch) -> torch.Tensor:
        """Writes the layer's keys where given, selects the top-k and attends: [T, H, kv_lora_rank]."""
