"""Writes a small Llama checkpoint with random weights, in which attention matters.

    python dense_model.py CONFIG DIRECTORY

As target and as draft (STANDALONE) its drafts are accepted wherever draft steps read what they should.
CONFIG is a folder with a tokenizer.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ATTENTION = 8.0  # of attention's output, over the embedding's own size


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, kv, middle = CONFIG["hidden_size"], 2 * CONFIG["head_dim"], CONFIG["intermediate_size"]

    def noise(rows: int, cols: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=generator) * gain / cols**0.5).bfloat16()

    found = {
        "model.embed_tokens.weight": noise(CONFIG["vocab_size"], hidden, hidden**0.5),
        "lm_head.weight": noise(CONFIG["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, rows, gain in (
            ("q", hidden, 1.2),
            ("k", kv, 1.2),
            ("v", kv, 1.0),
            ("o", hidden, ATTENTION),
        ):
            found[f"{layer}self_attn.{name}_proj.weight"] = noise(rows, hidden, gain)
        for name, rows, cols in (("gate", middle, hidden), ("up", middle, hidden), ("down", hidden, middle)):
            found[f"{layer}mlp.{name}_proj.weight"] = noise(rows, cols)
    return found


def main() -> None:
    source, directory = map(Path, sys.argv[1:3])
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights(), directory / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("*token*"):
        shutil.copy(path, directory / path.name)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1))
    print(f"wrote {directory}")


if __name__ == "__main__":
    main()
