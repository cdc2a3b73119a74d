"""Small random models, written by transformers, and a plain driver of our models over a paged cache."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sglang.srt.layers.attention.nsa.paths import MetadataSelection
from sglang.srt.layers.attention.nsa_backend import NativeSparseAttnBackend, NSAConfig
from sglang.srt.layers.attention.registry import SparseAttentionOps, select_attention_ops
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool, ReqToTokenPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

transformers = pytest.importorskip("transformers")
if "DeepseekV32ForCausalLM" not in dir(transformers):  # without importing it
    pytest.skip("this transformers has no DeepseekV32ForCausalLM", allow_module_level=True)

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@dataclass(frozen=True)
class ModelCase:
    """A model and a context length to run it at."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    context: int = 44
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        return TINY | self.overrides


def reference_model(case: ModelCase) -> torch.nn.Module:
    """transformers' model of a case, with weights large enough that attention and routing discriminate."""
    model = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**case.config))
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(0.1 * noise)
            else:
                tensor.copy_(noise * (1.0 if "embed" in name else 1.5 * tensor.shape[-1] ** -0.5))
    return model.eval()


def deepseek_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under the names that DeepSeek's own checkpoints use: one by one experts."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for i, matrix in enumerate(tensor):
                prefix = name.replace("gate_up_proj", str(i))
                gate, up = matrix.chunk(2)
                tensors[f"{prefix}.gate_proj.weight"] = gate.clone()
                tensors[f"{prefix}.up_proj.weight"] = up.clone()
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix(".down_proj")
            tensors |= {f"{prefix}.{i}.down_proj.weight": m.clone() for i, m in enumerate(tensor)}
        else:
            tensors[name] = tensor.clone()
    return tensors


def nextn_names(layer_model: torch.nn.Module, layer: int, seed: int) -> dict[str, torch.Tensor]:
    """A one-layer model's weights as the NextN layer of a checkpoint, with random projections in front."""
    prefix = f"model.layers.{layer}."
    tensors = {}
    for name, tensor in deepseek_names(layer_model).items():
        if name.startswith("model.layers.0."):
            tensors[name.replace("model.layers.0.", prefix)] = tensor
    hidden = layer_model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    tensors[prefix + "shared_head.norm.weight"] = layer_model.model.norm.weight.detach().clone()
    tensors[prefix + "enorm.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)
    tensors[prefix + "hnorm.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)
    tensors[prefix + "eh_proj.weight"] = (
        torch.randn(hidden, 2 * hidden, generator=generator) * (2 * hidden) ** -0.5
    )
    # Copies of the target's, as DeepSeek stores them; NaN here proves that they are not used.
    vocab = layer_model.config.vocab_size
    tensors[prefix + "embed_tokens.weight"] = torch.full((vocab, hidden), float("nan"))
    tensors[prefix + "shared_head.head.weight"] = torch.full((vocab, hidden), float("nan"))
    return tensors


def save_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1
) -> None:
    """Writes config.json and the weights, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    base = {"architectures": ["DeepseekV32ForCausalLM"], "eos_token_id": 1, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(base | config))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


class PagedDriver:
    """Runs one model on one request after another over a shuffled, poisoned page pool.

    `selected[layer]` collects, for each row that ran, the set of positions that it attended to.
    """

    def __init__(self, config: ModelConfig, layers: int, page_size: int = 4, pages: int = 80) -> None:
        self.config, self.page_size = config, page_size
        self.requests = ReqToTokenPool(4, config.context_len, config.hidden_size, config.device)
        self.requests.req_to_token[1:] = -7  # a page that nobody may follow
        self.pool = MLATokenToKVPool(
            pages,
            page_size,
            layers,
            config.kv_lora_rank,
            config.qk_rope_head_dim,
            config.index_head_dim,
            config.dtype,
            config.device,
        )
        for buffer in self.pool.kv_buffer + self.pool.index_k_buffer:
            buffer.fill_(float("nan"))
        self.free_pages = (torch.randperm(pages, generator=torch.Generator().manual_seed(1)) + 1).tolist()
        self.position_of_slot: dict[int, int] = {}
        self.selected: list[list[set[int]]] = []
        ops = select_attention_ops("auto", torch.device(config.device), "tests")
        ops = replace(ops, sparse_mla=self._recording(ops), dense_mla=None)
        nsa = NSAConfig(
            topk=config.index_topk,
            page_size=page_size,
            width=config.context_len,
            device=torch.device(config.device),
            selection=MetadataSelection(),
            prefill_ops=ops,
            decode_ops=ops,
        )
        self.backend = NativeSparseAttnBackend(nsa)

    def _recording(self, ops: SparseAttentionOps):
        def sparse_mla(q_nope, q_rope, kv_buffer, slots, *args):
            self.selected.append(
                [{self.position_of_slot[s] for s in row if s >= 0} for row in slots.tolist()]
            )
            return ops.sparse_mla(q_nope, q_rope, kv_buffer, slots, *args)

        return sparse_mla

    def _slots(self, request: int, start: int, end: int) -> torch.Tensor:
        table = self.requests.req_to_token
        for position in range(start, end):
            if position % self.page_size == 0:
                page = self.free_pages.pop()
            else:
                page = int(table[request, position - 1]) // self.page_size
            slot = page * self.page_size + position % self.page_size
            table[request, position] = slot
            self.position_of_slot[slot] = position
        return table[request, start:end].long()

    def run(
        self,
        model: torch.nn.Module,
        rows: list[tuple[int, int, list[int]]],
        mode: ForwardMode,
        hidden_states: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Runs (request, first position, token ids) of each request. Returns logits [T, vocab], or those of
        each request's last row."""
        self.selected = []
        device = self.config.device
        lens = [start + len(ids) for _, start, ids in rows]
        loc = [self._slots(request, start, start + len(ids)) for request, start, ids in rows]
        positions = [torch.arange(start, start + len(ids)) for _, start, ids in rows]
        last_rows = torch.tensor([len(ids) for _, _, ids in rows], device=device).cumsum(0) - 1
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=len(rows),
            input_ids=torch.tensor([t for _, _, ids in rows for t in ids], device=device),
            positions=torch.cat(positions).to(device),
            out_cache_loc=torch.cat(loc),
            req_pool_indices=torch.tensor([r for r, _, _ in rows], dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
            req_to_token_pool=self.requests,
            token_to_kv_pool=self.pool,
            attn_backend=self.backend,
            seq_lens_cpu=lens,
            row_requests=torch.tensor([r for r, _, ids in rows for _ in ids], device=device),
            last_rows=last_rows if last_only else None,
            hidden_states=hidden_states,
        )
        self.backend.init_forward_metadata(batch)
        return model.compute_logits(model(batch))
