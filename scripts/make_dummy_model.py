"""Writes a small random DeepSeek-V3.2 checkpoint: config, weights with the NextN layer, byte tokenizer.

    python scripts/make_dummy_model.py DIRECTORY [--seed 0]

The weights are large, so that the largest logit is clearly the largest and greedy tokens do not depend on
the order of a sum.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<bos>", "<eos>", "<user>", "<assistant>")  # ids 256 .. 259
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<assistant>{{ m.content }}<eos>{% else %}<user>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def dummy_config(**changes: Any) -> dict[str, Any]:
    """config.json of the model, with `changes` applied."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
    } | changes


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight by its name in a DeepSeek checkpoint. The NextN layer comes after the last layer."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers, nextn = config["num_hidden_layers"], config["num_nextn_predict_layers"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(layers + nextn):
        sparse = i >= config["first_k_dense_replace"]
        layer = layer_shapes(config, sparse)
        if i >= layers:
            layer |= {
                "enorm.weight": (hidden,),
                "hnorm.weight": (hidden,),
                "eh_proj.weight": (hidden, 2 * hidden),
                "shared_head.norm.weight": (hidden,),
                "shared_head.head.weight": (vocab, hidden),
                "embed_tokens.weight": (vocab, hidden),
            }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def layer_shapes(config: dict[str, Any], sparse: bool) -> dict[str, tuple[int, ...]]:
    """The weights of one decoder layer."""
    hidden, heads, q_rank = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    rank, nope, rope = config["kv_lora_rank"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value, index_heads, index_dim = config["v_head_dim"], config["index_n_heads"], config["index_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_a_proj.weight": (q_rank, hidden),
        "self_attn.q_a_layernorm.weight": (q_rank,),
        "self_attn.q_b_proj.weight": (heads * (nope + rope), q_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), rank),
        "self_attn.o_proj.weight": (hidden, heads * value),
        "self_attn.indexer.wq_b.weight": (index_heads * index_dim, q_rank),
        "self_attn.indexer.wk.weight": (index_dim, hidden),
        "self_attn.indexer.k_norm.weight": (index_dim,),
        "self_attn.indexer.k_norm.bias": (index_dim,),
        "self_attn.indexer.weights_proj.weight": (index_heads, hidden),
    }
    if not sparse:
        return shapes | mlp_shapes("mlp", hidden, config["intermediate_size"])
    experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
    shapes["mlp.gate.weight"] = (experts, hidden)
    shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    for expert in range(experts):
        shapes |= mlp_shapes(f"mlp.experts.{expert}", hidden, inner)
    return shapes | mlp_shapes("mlp.shared_experts", hidden, inner * config["n_shared_experts"])


def mlp_shapes(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """float32 weights: norms near 1, everything else normal with the standard deviation of `spread`.

    The NextN layer is a copy of the last layer that sees the next token's embedding, so that it is right
    about some tokens and wrong about others.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in weight_shapes(config).items():
        noise = torch.randn(shape, generator=generator) * spread(name)
        weights[name] = 1 + noise if "norm.weight" in name else noise
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    if config["num_nextn_predict_layers"]:
        last, nextn = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
        for name in [name for name in weights if name.startswith(last)]:
            copy = name.replace(last, nextn)
            if copy in weights:  # else the last layer is dense
                weights[copy] = weights[name].clone()
        weights[nextn + "eh_proj.weight"][:, :hidden] += torch.eye(hidden)
        for name, shared in (
            ("enorm.weight", torch.ones(hidden)),
            ("shared_head.norm.weight", weights["model.norm.weight"]),
            ("embed_tokens.weight", weights["model.embed_tokens.weight"]),
            ("shared_head.head.weight", weights["lm_head.weight"]),
        ):
            weights[nextn + name] = shared.clone()
    return weights


def spread(name: str) -> float:
    """Standard deviation of a weight: what makes the last token matter most, then the tokens before it."""
    spreads = {
        "embed_tokens.weight": 1.0,
        "lm_head.weight": 0.4,
        "o_proj.weight": 0.1,
        "down_proj.weight": 0.01,
        "eh_proj.weight": 0.02,
    }
    return next((value for ending, value in spreads.items() if name.endswith(ending)), 0.2)


def byte_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Token i is byte i, then the special tokens, then words that no text is tokenized to."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of_letter)
    extra = [f"<extra_{i}>" for i in range(vocab_size - 256 - len(SPECIAL_TOKENS))]
    vocab = {token: i for i, token in enumerate([*letters, *SPECIAL_TOKENS, *extra])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _byte_of_letter(letter: str) -> int:
    """The byte that the byte-level alphabet writes as `letter`: printable ones as themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    if ord(letter) < 256:
        return ord(letter)
    return [b for b in range(256) if b not in printable][ord(letter) - 256]


def write_config(directory: Path | str, config_changes: dict[str, Any]) -> Path:
    """Config and tokenizer alone: enough for `--load-format dummy`. Returns the directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = dummy_config(**config_changes)
    byte_tokenizer(config["vocab_size"]).save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return directory


def make_dummy_model(directory: Path | str, seed: int = 0, **config_changes: Any) -> Path:
    """Writes the checkpoint and returns its directory."""
    directory = write_config(directory, config_changes)
    weights = random_weights(dummy_config(**config_changes), seed)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes a small random DeepSeek-V3.2 checkpoint.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"wrote {make_dummy_model(arguments.directory, arguments.seed)}")
