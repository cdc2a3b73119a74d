"""DeepSeek-V3.2: multi-head latent attention with the lightning indexer, and mixture of experts.

Sources: DeepSeek-V2 (https://arxiv.org/abs/2405.04434) for latent attention, DeepSeek-V3
(https://arxiv.org/abs/2412.19437) for the experts, and the DeepSeek-V3.2-Exp report for the indexer.
Module names are those of the checkpoint; what is stacked here (gate and up, experts) the loader slices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.layers.attention.base_attn_backend import MLAInputs
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import Layer, linear, multiply, multiply_heads, stacked
from sglang.srt.layers.moe import DeepseekMoE, GatedMLP
from sglang.srt.layers.rotary import RotaryEmbedding, apply_rotary_half, apply_rotary_interleaved
from sglang.srt.layers.triton_kernels import runs_triton
from sglang.srt.model_config import ModelConfig

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


LATENT_NORM_EPS = 1e-6  # of the query's and the key's latents and of the indexer's keys, whatever the config


class Indexer(Layer):
    """Projects the indexer's queries, keys and head weights; the backend scores and selects."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        options = {"dtype": dtype, "device": device}
        self.wq_b = linear(config.q_lora_rank, self.n_heads * self.head_dim, **options)
        self.wk = linear(config.hidden_size, self.head_dim, **options)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=LATENT_NORM_EPS, **options)
        # float32 in every dtype of the model: the selection is sensitive to these weights.
        self.weights_proj = linear(config.hidden_size, self.n_heads, dtype=torch.float32, device=device)
        # The score's 1 / sqrt(head_dim) is positive, so it may leave the relu and join the weights' scale.
        self.scale = self.n_heads**-0.5 * self.head_dim**-0.5

    def keys(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """x [T, hidden], rotation [T, 1, rope / 2] complex64 -> [T, Di]"""
        return apply_rotary_half(self.k_norm(self.wk(x))[:, None], rotation).squeeze(1)

    def queries(
        self, x: torch.Tensor, q_latent: torch.Tensor, rotation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden], q_latent [T, q_lora_rank] -> queries [T, Hi, Di], weights [T, Hi] float32."""
        q = self.wq_b(q_latent).unflatten(-1, (self.n_heads, self.head_dim))
        return apply_rotary_half(q, rotation), self.weights_proj(x.float()) * self.scale


class MLAttention(Layer):
    """Multi-head latent attention, always absorbed: W_UK joins the query and W_UV the output."""

    def __init__(
        self, config: ModelConfig, layer_id: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        options = {"dtype": dtype, "device": device}
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.config = config
        self.layer_id = layer_id
        self.q_head_dims = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.kv_dims = (config.kv_lora_rank, config.qk_rope_head_dim)
        self.q_a_proj = linear(hidden, config.q_lora_rank, bias, **options)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, **options)
        self.q_b_proj = linear(config.q_lora_rank, heads * sum(self.q_head_dims), **options)
        self.kv_a_proj_with_mqa = linear(hidden, sum(self.kv_dims), bias, **options)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS, **options)
        self.kv_b_proj = linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), **options
        )
        self.o_proj = linear(heads * config.v_head_dim, hidden, bias, **options)
        self.indexer = Indexer(config, **options)
        self.kv_b_proj.products = ()  # never multiplied as a whole
        # Views into kv_b_proj, which the loader fills in place: [H, nope, C] and [H, v_head_dim, C].
        per_head = self.kv_b_proj.weight.detach().unflatten(0, (heads, -1))
        self.w_uk, self.w_uv = per_head.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        self.fused = runs_triton(device) and not bias
        if self.fused:  # one product for all that is made of x, one for all that is made of q_latent
            self.from_hidden = stacked(self.q_a_proj, self.kv_a_proj_with_mqa, self.indexer.wk)
            self.from_q_latent = stacked(self.q_b_proj, self.indexer.wq_b)
            self.indexer.weights_proj.products = ()  # its kernel wants the inputs side by side

    def forward(self, x: torch.Tensor, rotation: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """x [T, hidden], rotation [T, 1, rope / 2] complex64 -> [queries, hidden]"""
        make_inputs = self._fused_inputs if self.fused else self._inputs
        inputs = make_inputs(x, rotation, forward_batch)
        latents = forward_batch.attn_backend.forward(self.layer_id, inputs, forward_batch)
        values = multiply_heads(latents, self.w_uv.transpose(1, 2))  # [queries, H, v_head_dim]
        return self.o_proj(values.flatten(1))

    def _inputs(self, x: torch.Tensor, rotation: torch.Tensor, forward_batch: ForwardBatch) -> MLAInputs:
        kv_latent, k_rope = self.kv_a_proj_with_mqa(x).split(self.kv_dims, dim=-1)
        k_rope = apply_rotary_interleaved(k_rope[:, None], rotation).squeeze(1)
        k_index = self.indexer.keys(x, rotation)
        if forward_batch.last_rows is not None:
            x, rotation = x[forward_batch.last_rows], rotation[forward_batch.last_rows]
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).unflatten(-1, (self.config.num_attention_heads, -1))
        q_nope, q_rope = q.split(self.q_head_dims, dim=-1)
        q_index = index_weights = None
        if forward_batch.attn_backend.selects_keys():
            q_index, index_weights = self.indexer.queries(x, q_latent, rotation)
        q_nope, q_rope = self._absorbed(q_nope, apply_rotary_interleaved(q_rope, rotation))
        return MLAInputs(
            q_nope=q_nope,
            q_rope=q_rope,
            kv_latent=self.kv_a_layernorm(kv_latent),
            k_rope=k_rope,
            q_index=q_index,
            k_index=k_index,
            index_weights=index_weights,
            softmax_scale=self.config.softmax_scale,
        )

    def _absorbed(self, q_nope: torch.Tensor, q_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q_nope [T, H, nope] becomes [T, H, C]. On CUDA it and q_rope [T, H, R] then lie side by side in one
        tensor, as kernels read them."""
        if not q_nope.is_cuda:
            return multiply_heads(q_nope, self.w_uk), q_rope
        q = q_nope.new_empty((*q_nope.shape[:2], sum(self.kv_dims)))
        absorbed, rotated = q.split(self.kv_dims, dim=-1)
        multiply_heads(q_nope, self.w_uk, out=absorbed)
        rotated.copy_(q_rope)
        return absorbed, rotated

    def _fused_inputs(
        self, x: torch.Tensor, rotation: torch.Tensor, forward_batch: ForwardBatch
    ) -> MLAInputs:
        """The same in four launches of few rows, with the keys written on the way. The halves of the query lie side by
        side in one tensor, as kernels read them."""
        from sglang.srt.layers.triton_kernels.absorb_queries import absorb_queries
        from sglang.srt.layers.triton_kernels.latents import write_latents
        from sglang.srt.layers.triton_kernels.rotate_queries import rotate_queries
        from sglang.srt.layers.triton_kernels.small_linear import MAX_ROWS, small_linear

        pool, loc, indexer = forward_batch.token_to_kv_pool, forward_batch.out_cache_loc, self.indexer
        kv = pool.kv_buffer[self.layer_id] if pool.stores_rows else x.new_empty((len(x), sum(self.kv_dims)))
        selects = forward_batch.attn_backend.selects_keys()
        index_product = indexer.weights_proj.weight, indexer.scale
        at_once = selects and len(x) <= MAX_ROWS and forward_batch.last_rows is None
        q_latent, index_weights = write_latents(
            multiply(x, self.from_hidden),
            rotation,
            loc,
            (self.q_a_layernorm.weight, self.q_a_layernorm.eps),
            (self.kv_a_layernorm.weight, self.kv_a_layernorm.eps),
            (indexer.k_norm.weight, indexer.k_norm.bias, indexer.k_norm.eps),
            kv,
            pool.index_k_buffer[self.layer_id],
            by_slot=pool.stores_rows,
            index_product=(x, *index_product) if at_once else None,
        )
        if not pool.stores_rows:
            pool.set_mla_kv_buffer(self.layer_id, loc, *kv.split(self.kv_dims, dim=-1))
        if forward_batch.last_rows is not None:
            x, q_latent, rotation = (rows[forward_batch.last_rows] for rows in (x, q_latent, rotation))
        split = self.q_b_proj.out_features
        queries = multiply(q_latent, self.from_q_latent if selects else self.q_b_proj.weight)
        heads = queries[:, :split].unflatten(-1, (self.config.num_attention_heads, -1))
        q_index = None
        if selects:
            q_index = queries[:, split:].unflatten(-1, (indexer.n_heads, indexer.head_dim))
            if not at_once:
                index_weights = small_linear(x, *index_product)
        q = x.new_empty((*heads.shape[:2], sum(self.kv_dims)))
        q_nope, q_rope = q.split(self.kv_dims, dim=-1)
        if len(heads) <= MAX_ROWS:
            absorb_queries(heads, self.w_uk, q_nope, q_rope, q_index, rotation)
        else:
            multiply_heads(heads[..., : self.q_head_dims[0]], self.w_uk, out=q_nope)
            rotate_queries(heads, q_rope, q_index, rotation)
        return MLAInputs(
            q_nope=q_nope,
            q_rope=q_rope,
            kv_latent=None,
            k_rope=None,
            q_index=q_index,
            k_index=None,
            index_weights=index_weights,
            softmax_scale=self.config.softmax_scale,
        )


class DeepseekV32DecoderLayer(Layer):
    """Attention and MLP (dense or experts), each with its norm and residual.

    `config_layer` is the layer's number in the config, `layer_id` its number in the KV pool.
    """

    def __init__(
        self,
        config: ModelConfig,
        config_layer: int,
        layer_id: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        options = {"dtype": dtype, "device": device}
        self.self_attn = MLAttention(config, layer_id, **options)
        if config.mlp_layer_types[config_layer] == "sparse":
            self.mlp = DeepseekMoE(config, **options)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, **options)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)

    def forward(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        rotation: torch.Tensor,
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta [T, hidden] comes in, and goes out, as two: the next norm adds them; out come the rows
        that are asked for. Rotation [T, 1, rope / 2], complex64."""
        normed, x = self.input_layernorm.add(x, delta)
        attended = self.self_attn(normed, rotation, forward_batch)
        if forward_batch.last_rows is not None:
            x = x[forward_batch.last_rows]
        normed, x = self.post_attention_layernorm.add(x, attended)
        return x, self.mlp(normed)


class DeepseekV32Model(Layer):
    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        options = {"dtype": dtype, "device": device}
        # uninitialised; `skip_init` goes by the meta device, which imports TorchDynamo
        table = torch.empty(config.vocab_size, config.hidden_size, **options)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(
            DeepseekV32DecoderLayer(config, i, i, **options) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)
        self.rotary_emb = RotaryEmbedding(config.rope, config.qk_rope_head_dim, device)

    def forward(self, forward_batch: ForwardBatch) -> torch.Tensor:
        rotation = forward_batch.rotation
        if rotation is None:
            rotation = self.rotary_emb(forward_batch.positions)
        x, delta = self.embed_tokens(forward_batch.input_ids), None
        for layer in self.layers:
            x, delta = layer(x, delta, rotation, forward_batch)
        return self.norm.add(x, delta)[0]


class DeepseekV32ForCausalLM(Layer):
    """The target model. Weights are uninitialised until the loader has filled them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config = config
        self.model = DeepseekV32Model(config, dtype=dtype, device=device)
        self.lm_head = linear(config.hidden_size, config.vocab_size, dtype=dtype, device=device)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            self.lm_head.products = ()
        self.requires_grad_(False)

    @property
    def rotary_emb(self) -> RotaryEmbedding:
        return self.model.rotary_emb

    @torch.inference_mode()
    def forward(self, forward_batch: ForwardBatch) -> torch.Tensor:
        """Runs all layers. Returns the hidden states after the final norm, [T, hidden]."""
        return self.model(forward_batch)

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] -> [R, vocab], in the model's dtype"""
        return multiply(hidden, self.lm_head.weight)

    def checkpoint_weights(self) -> dict[str, torch.Tensor]:
        """Every weight to fill, by its name in the checkpoint."""
        return dict(self.named_parameters())  # a tied lm_head appears once, as the embedding

    def ignored_checkpoint_weights(self) -> set[str]:
        """Names that a checkpoint may hold without a use here."""
        return {"lm_head.weight"} if self.config.tie_word_embeddings else set()
