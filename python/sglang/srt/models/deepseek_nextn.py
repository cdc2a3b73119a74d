"""The multi-token-prediction (NextN) layer of DeepSeek checkpoints: the draft model.

Source: DeepSeek-V3 (https://arxiv.org/abs/2412.19437), section 2.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import Layer, linear, multiply
from sglang.srt.layers.rotary import RotaryEmbedding
from sglang.srt.layers.triton_kernels import runs_triton
from sglang.srt.model_config import ModelConfig
from sglang.srt.models.deepseek_v32 import DeepseekV32DecoderLayer

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class DeepseekV3ForCausalLMNextN(Layer):
    """One decoder layer over the next token's embedding and the target's hidden state.

    In the checkpoint it is layer `num_hidden_layers`. The copies of the embedding and the head stored there
    are the target's own, so they are not loaded: `set_embed_and_head` shares the target's.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        options = {"dtype": dtype, "device": device}
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.enorm = RMSNorm(hidden, eps, **options)
        self.hnorm = RMSNorm(hidden, eps, **options)
        self.eh_proj = linear(2 * hidden, hidden, **options)
        self.decoder = DeepseekV32DecoderLayer(config, config.num_hidden_layers, 0, **options)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(hidden, eps, **options)})
        self.rotary_emb = RotaryEmbedding(config.rope, config.qk_rope_head_dim, device)
        self.fused = runs_triton(device)
        self.embed: torch.Tensor | None = None  # [vocab, hidden]: the target's
        self.head: torch.Tensor | None = None  # [vocab, hidden]: the target's
        self.requires_grad_(False)

    def set_embed_and_head(self, embed: torch.Tensor, head: torch.Tensor) -> None:
        """Shares the target's embedding and output matrices, each [vocab, hidden]."""
        self.embed, self.head = embed.detach(), head.detach()  # not parameters of this module

    @torch.inference_mode()
    def forward(self, forward_batch: ForwardBatch) -> torch.Tensor:
        """Reads input_ids and hidden_states [T, hidden]. Returns hidden states after the head's norm, of
        `last_rows` alone where these are given."""
        assert self.embed is not None, "set_embed_and_head comes first"
        assert forward_batch.hidden_states is not None
        rotation = forward_batch.rotation
        if rotation is None:
            rotation = self.rotary_emb(forward_batch.positions)
        x = self.eh_proj(self._inputs(forward_batch.input_ids, forward_batch.hidden_states))
        x, delta = self.decoder(x, None, rotation, forward_batch)
        return self.shared_head["norm"].add(x, delta)[0]

    def _inputs(self, input_ids: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """input_ids [T], hidden_states [T, hidden] -> [T, 2 * hidden]"""
        if self.fused:
            from sglang.srt.layers.triton_kernels.nextn_inputs import nextn_inputs

            norms = ((norm.weight, norm.eps) for norm in (self.enorm, self.hnorm))
            return nextn_inputs(input_ids, self.embed, hidden_states, *norms)
        embedded = self.enorm(F.embedding(input_ids, self.embed))
        return torch.cat((embedded, self.hnorm(hidden_states.to(embedded.dtype))), dim=-1)

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] -> [R, vocab], in the model's dtype"""
        assert self.head is not None, "set_embed_and_head comes first"
        return multiply(hidden, self.head)

    @property
    def _prefix(self) -> str:
        return f"model.layers.{self.config.num_hidden_layers}."

    def checkpoint_weights(self) -> dict[str, torch.Tensor]:
        """Every weight to fill, by its name in the checkpoint."""
        return {self._prefix + name.removeprefix("decoder."): p for name, p in self.named_parameters()}

    def ignored_checkpoint_weights(self) -> set[str]:
        """Names that a checkpoint may hold without a use here."""
        return {self._prefix + name for name in ("embed_tokens.weight", "shared_head.head.weight")}
