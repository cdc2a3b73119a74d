"""Writes a DeepSeek-V3.2-shaped checkpoint whose drafts are accepted if their attention reads what it should.

    python accepted_model.py CONFIG_FOLDER DIRECTORY [--device cuda]

Dummy weights say nothing about drafts: none is accepted. Here all layers but the last pass the embedding on,
and the NextN layer is the last layer, a little disturbed. Both choose the next token mostly by what their
attention found in the context: a draft step that attends to other tokens draws another token and is rejected.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
from make_dummy_model import weight_shapes

ATTENTION = 8.0  # what attention adds, in terms of the embedding's own size
SHARPNESS = 1.2  # of attention: the standard deviation of its logits before SGLang's own scale
DISTURBED = 0.3  # of the NextN layer's output


def accepted_weights(config: dict[str, Any], device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """bfloat16 weights by name."""
    generator = torch.Generator(device).manual_seed(seed)

    def noise(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * deviation).bfloat16()

    weights = {}
    for name, shape in weight_shapes(config).items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape, device=device, dtype=torch.bfloat16)
        elif name.endswith("bias"):
            weights[name] = torch.zeros(shape, device=device, dtype=torch.float32)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros(shape, device=device, dtype=torch.bfloat16)
        else:
            gain = SHARPNESS if name.endswith("q_b_proj.weight") else 1.0
            weights[name] = noise(shape, gain / shape[-1] ** 0.5)
    embedding = noise((config["vocab_size"], config["hidden_size"]), 1.0)
    order = torch.randperm(config["vocab_size"], generator=generator, device=device)
    layers = config["num_hidden_layers"]
    last, nextn = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    output = weights[last + "self_attn.o_proj.weight"]
    output.copy_(noise(output.shape, ATTENTION / output.shape[-1] ** 0.5 / 0.4))  # averaging leaves about 0.4
    for name in [name for name in weights if name.startswith(last)]:
        weights[name.replace(last, nextn)] = weights[name].clone()
    disturbed = weights[nextn + "self_attn.o_proj.weight"]
    disturbed += noise(disturbed.shape, DISTURBED * output.float().std().item())
    weights[nextn + "eh_proj.weight"].zero_()
    weights[nextn + "eh_proj.weight"][:, : config["hidden_size"]].fill_diagonal_(1)
    for prefix in ("model.", nextn):
        weights[prefix + "embed_tokens.weight"] = embedding.clone()
    for name in ("lm_head.weight", nextn + "shared_head.head.weight"):
        weights[name] = embedding[order].clone()  # without attention, every token has one successor
    return weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    config = json.loads((options.config / "config.json").read_text())
    options.directory.mkdir(parents=True, exist_ok=True)
    weights = {name: w.cpu() for name, w in accepted_weights(config, options.device).items()}
    save_file(weights, options.directory / "model.safetensors", metadata={"format": "pt"})
    for path in options.config.glob("*.json"):
        shutil.copy(path, options.directory / path.name)
    print(f"wrote {options.directory}: {sum(w.numel() for w in weights.values()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
