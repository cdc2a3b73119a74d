"""Writes the checkpoint as Hugging Face loads it, and reads it back."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from .config import BOS, EOS, PAD, ModelConfig
from .model import TinyNSA

# A message of the user or the system becomes comments, one of the assistant stays code.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ message['content'] + '\n\n' }}"
    "{%- else -%}{{ '# ' + message['content'] | replace('\n', '\n# ') + '\n' }}"
    "{%- endif -%}{%- endfor -%}"
)


def hf_name(name: str, layers: int) -> str:
    """The name under which a DeepSeek checkpoint stores the parameter ``name`` of ``TinyNSA``."""
    nextn = f"model.layers.{layers}."
    if name == "nextn.norm.weight":
        return nextn + "shared_head.norm.weight"
    if name.startswith("nextn.layer."):
        return nextn + name.removeprefix("nextn.layer.")
    if name.startswith("nextn."):
        return nextn + name.removeprefix("nextn.")
    return name if name.startswith("lm_head.") else "model." + name


def save_model(model: TinyNSA, config: ModelConfig, out: Path) -> None:
    """``config.json``, ``generation_config.json``, ``model.safetensors`` (BF16; selection biases fp32)."""
    layers = config.num_hidden_layers
    tensors = {}
    for name, tensor in model.state_dict().items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        tensors[hf_name(name, layers)] = tensor.detach().to("cpu", dtype).contiguous()
    nextn = f"model.layers.{layers}."
    tensors[nextn + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[nextn + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    write_json(out / "config.json", config.to_hf())
    write_json(
        out / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False},
    )


def load_model(out: Path, device: torch.device) -> TinyNSA:
    """The saved checkpoint as ``TinyNSA`` in float32."""
    config = json.loads((out / "config.json").read_text())
    model = TinyNSA(ModelConfig(**{name: config[name] for name in ModelConfig.__dataclass_fields__}))
    stored = load_file(out / "model.safetensors")
    layers = model.config.num_hidden_layers
    model.load_state_dict({name: stored[hf_name(name, layers)].float() for name in model.state_dict()})
    return model.to(device).eval()


def save_tokenizer(tokenizer: Tokenizer, config: ModelConfig, out: Path) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def save_curve(history: list[dict[str, float | str]], path: Path) -> None:
    """The loss over the steps of training, a colour for each phase; held-out bits per byte as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=80)
    loss_axis, agree_axis = figure.subplots(1, 2)
    for phase in dict.fromkeys(point["phase"] for point in history):
        points = [p for p in history if p["phase"] == phase]
        for key, axis, style in (
            ("nats", loss_axis, "-"),
            ("held_out", loss_axis, "o"),
            ("agree_1", agree_axis, "-"),
            ("agree_4", agree_axis, ":"),
        ):
            seen = [(p["step"], p[key]) for p in points if key in p]
            if seen:
                labels = {"nats": "nats per token", "held_out": "held-out bits per byte"}
                label = f"{phase}: {labels.get(key, key.replace('agree_', 'draft step '))}"
                axis.plot(*zip(*seen, strict=True), style, label=label, linewidth=0.8, markersize=3)
    loss_axis.set(title="next token", xlabel="steps", ylim=(0.5, 3.5))
    agree_axis.set(title="drafts that equal the target's choice", xlabel="steps")
    for axis in (loss_axis, agree_axis):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
