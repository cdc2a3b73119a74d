"""Fills the models from safetensors files, or with seeded random weights."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from sglang.srt.layers.linear import lay_out_for_cpu
from sglang.srt.model_config import ModelConfig
from sglang.srt.models.deepseek_nextn import DeepseekV3ForCausalLMNextN
from sglang.srt.models.deepseek_v32 import DeepseekV32ForCausalLM

logger = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "dummy")
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PROGRESS_BAR_BYTES = 1 << 30  # loads below this are over before a bar could be read
LISTED_NAMES = 20  # of each kind in an error message

Model = DeepseekV32ForCausalLM | DeepseekV3ForCausalLMNextN


def load_model(
    config: ModelConfig,
    load_format: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    with_nextn: bool = True,
    seed: int = 0,
) -> tuple[DeepseekV32ForCausalLM, DeepseekV3ForCausalLMNextN | None]:
    """Builds the target and, if the config has one and it is wanted, the NextN layer; fills both.

    dtype and device None mean the config's. Raises ValueError that lists every missing, unexpected and
    misshapen weight, and FileNotFoundError without safetensors files.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format must be one of {LOAD_FORMATS}, got {load_format!r}")
    dtype, device = dtype or config.dtype, device or config.device
    target = DeepseekV32ForCausalLM(config, dtype, device)
    nextn = None
    if config.num_nextn_predict_layers and with_nextn:
        nextn = DeepseekV3ForCausalLMNextN(config, dtype, device)
    models: list[Model] = [target] if nextn is None else [target, nextn]
    if load_format == "dummy":
        for model in models:
            _fill_randomly(model, config.initializer_range, seed)
    else:
        _fill_from_files(models, config, skip_nextn=not with_nextn)
    if torch.device(device).type == "cpu":
        for model in models:
            lay_out_for_cpu(model)
    if nextn is not None:
        nextn.set_embed_and_head(target.model.embed_tokens.weight, target.lm_head.weight)
    return target.eval(), nextn if nextn is None else nextn.eval()


def expand_stacked(targets: dict[str, torch.Tensor], stored: Iterable[str]) -> dict[str, torch.Tensor]:
    """Replaces weights that are stacked here by slices that carry the names of their parts.

    gate and up projections are two tensors in every checkpoint. Experts may be stored packed
    ([E, 2 * I, hidden], [E, hidden, I]: transformers) or one by one (DeepSeek): `stored` tells which.
    """
    stored = set(stored)
    expanded: dict[str, torch.Tensor] = {}
    for name, tensor in targets.items():
        if name.endswith(".mlp.experts.gate_up_proj") and name not in stored:
            prefix = name.removesuffix("gate_up_proj")
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                expanded[f"{prefix}{expert}.gate_proj.weight"] = gate
                expanded[f"{prefix}{expert}.up_proj.weight"] = up
        elif name.endswith(".mlp.experts.down_proj") and name not in stored:
            prefix = name.removesuffix("down_proj")
            expanded |= {f"{prefix}{i}.down_proj.weight": matrix for i, matrix in enumerate(tensor)}
        elif name.endswith(".gate_up_proj.weight"):
            prefix = name.removesuffix("gate_up_proj.weight")
            gate, up = tensor.chunk(2)
            expanded |= {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up}
        else:
            expanded[name] = tensor
    return expanded


def _fill_from_files(models: list[Model], config: ModelConfig, skip_nextn: bool) -> None:
    files = _files_of_names(Path(config.model_path))
    stored = {name for names in files.values() for name in names}
    targets: dict[str, torch.Tensor] = {}
    ignored: set[str] = set()
    for model in models:
        targets |= expand_stacked(model.checkpoint_weights(), stored)
        ignored |= model.ignored_checkpoint_weights()
    if skip_nextn and config.num_nextn_predict_layers:
        prefix = f"model.layers.{config.num_hidden_layers}."
        ignored |= {name for name in stored if name.startswith(prefix)}
    ignored |= {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    problems = [f"missing: {name}" for name in sorted(targets.keys() - stored)][:LISTED_NAMES]
    problems += [f"unexpected: {name}" for name in sorted(stored - targets.keys() - ignored)][:LISTED_NAMES]
    problems += _shape_problems(files, targets)[:LISTED_NAMES]
    if problems:
        counts = (
            f"{len(targets.keys() - stored)} missing, {len(stored - targets.keys() - ignored)} unexpected"
        )
        raise ValueError(
            f"weights in {config.model_path} do not fit the config ({counts}):\n" + "\n".join(problems)
        )
    _copy(files, targets)


def _files_of_names(folder: Path) -> dict[Path, list[str]]:
    """Which names each file holds. The index says which files belong; the files say what is in them."""
    index = folder / INDEX_NAME
    if index.exists():
        paths = sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
    else:
        paths = [folder / SINGLE_NAME]
    files: dict[Path, list[str]] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"no weights at {path} (expected {SINGLE_NAME} or {INDEX_NAME} in {folder})"
            )
        try:
            with safe_open(path, framework="pt") as file:
                files[path] = list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    owners = defaultdict(list)
    for path, names in files.items():
        for name in names:
            owners[name].append(path.name)
    if twice := {name: paths for name, paths in owners.items() if len(paths) > 1}:
        raise ValueError(f"weights stored more than once: {dict(sorted(twice.items())[:LISTED_NAMES])}")
    return files


def _shape_problems(files: dict[Path, list[str]], targets: dict[str, torch.Tensor]) -> list[str]:
    problems = []
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                if name not in targets:
                    continue
                view, expected = file.get_slice(name), list(targets[name].shape)
                if view.get_shape() != expected:
                    problems.append(f"shape: {name} is {view.get_shape()}, the config makes it {expected}")
                if view.get_dtype() not in ("F32", "BF16", "F16"):
                    problems.append(f"dtype: {name} is {view.get_dtype()}, expected F32, BF16 or F16")
    return problems


@torch.no_grad()
def _copy(files: dict[Path, list[str]], targets: dict[str, torch.Tensor]) -> None:
    total = sum(path.stat().st_size for path in files)
    small = total < PROGRESS_BAR_BYTES
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=small) as bar:
        for path, names in files.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if name not in targets:
                        continue
                    tensor = file.get_tensor(name)
                    targets[name].copy_(tensor)
                    bar.update(tensor.numel() * tensor.element_size())
    logger.info("loaded %d weights, %.1f MiB, from %d files", len(targets), total / 2**20, len(files))


@torch.no_grad()
def _fill_randomly(model: Model, std: float, seed: int) -> None:
    """Norms become the identity, biases 0, everything else normal; the same for a seed, device and dtype."""
    weights = model.checkpoint_weights()
    for i, (name, weight) in enumerate(sorted(weights.items())):
        if name.endswith("bias"):
            weight.zero_()
        elif weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, std, generator=torch.Generator(weight.device).manual_seed(seed * 1000003 + i))
