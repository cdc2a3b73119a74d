"""The config and the weights loader: every layout of a checkpoint, and what can be wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_loader import load_model
from tiny_models import TINY, ModelCase, deepseek_names, nextn_names, reference_model, save_checkpoint

CASE = ModelCase("loader", {"num_nextn_predict_layers": 1, "num_hidden_layers": 2})
LAYER = ModelCase("layer", {"num_hidden_layers": 1, "first_k_dense_replace": 0}, seed=1)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return deepseek_names(reference_model(CASE)) | nextn_names(reference_model(LAYER), layer=2, seed=2)


def load(folder: Path, **options: Any):
    return load_model(ModelConfig.from_path(str(folder), dtype="float32"), **options)


def weights_of(model: torch.nn.Module) -> Tensors:
    return dict(model.named_parameters())


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_single_sharded_and_packed_files_load_the_same(tensors: Tensors, tmp_path: Path) -> None:
    packed = dict(reference_model(CASE).state_dict()) | nextn_names(reference_model(LAYER), layer=2, seed=2)
    packed = {name: tensor.clone() for name, tensor in packed.items()}
    save_checkpoint(tmp_path / "single", CASE.config, tensors)
    save_checkpoint(tmp_path / "shards", CASE.config, tensors, shards=5)
    save_checkpoint(tmp_path / "packed", CASE.config, packed)
    target, nextn = load(tmp_path / "single")
    for other in ("shards", "packed"):
        other_target, other_nextn = load(tmp_path / other)
        assert_same_weights(target, other_target)
        assert_same_weights(nextn, other_nextn)
    theirs = reference_model(CASE)
    moe = target.model.layers[1].mlp
    assert torch.equal(moe.experts.gate_up_proj, theirs.model.layers[1].mlp.experts.gate_up_proj)
    assert torch.equal(
        moe.gate.e_score_correction_bias, theirs.model.layers[1].mlp.gate.e_score_correction_bias
    )


def test_nextn_shares_the_targets_embedding_and_head(tensors: Tensors, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CASE.config, tensors)
    target, nextn = load(tmp_path)
    assert nextn.embed.data_ptr() == target.model.embed_tokens.weight.data_ptr()
    assert nextn.head.data_ptr() == target.lm_head.weight.data_ptr()
    without = {
        name: t for name, t in tensors.items() if "layers.2.embed" not in name and "head.head" not in name
    }
    save_checkpoint(tmp_path / "without_copies", CASE.config, without)
    assert_same_weights(nextn, load(tmp_path / "without_copies")[1])


def test_nextn_is_not_loaded_where_it_is_not_wanted(tensors: Tensors, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CASE.config, tensors)
    assert load(tmp_path, with_nextn=False)[1] is None


def test_bfloat16_files_load_into_float32(tensors: Tensors, tmp_path: Path) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_checkpoint(tmp_path, CASE.config, rounded)
    target, _ = load(tmp_path)
    assert torch.equal(target.lm_head.weight, rounded["lm_head.weight"].float())


@dataclass(frozen=True)
class BadWeights:
    name: str
    change: Callable[[Tensors], None]
    message: str  # a regular expression


def _drop(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


BAD_WEIGHTS = [
    BadWeights(
        "two_missing",
        _drop("model.norm.weight", "model.layers.1.mlp.experts.5.up_proj.weight"),
        r"2 missing, 0 unexpected[^$]*missing: model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight\n"
        r"missing: model\.norm\.weight",
    ),
    BadWeights(
        "missing_nextn", _drop("model.layers.2.enorm.weight"), r"missing: model\.layers\.2\.enorm\.weight"
    ),
    BadWeights(
        "unexpected",
        lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(1)}),
        r"unexpected: model\.layers\.1\.mlp\.experts\.8\.up_proj\.weight",
    ),
    BadWeights(
        "shape",
        lambda t: t.update({"lm_head.weight": torch.zeros(96, 48)}),
        r"shape: lm_head\.weight is \[96, 48\], the config makes it \[97, 48\]",
    ),
    BadWeights(
        "transposed_expert",
        lambda t: t.update({"model.layers.1.mlp.experts.0.down_proj.weight": torch.zeros(24, 48)}),
        r"experts\.0\.down_proj\.weight is \[24, 48\], the config makes it \[48, 24\]",
    ),
    BadWeights(
        "dtype",
        lambda t: t.update({"lm_head.weight": torch.zeros(97, 48, dtype=torch.float8_e4m3fn)}),
        r"dtype: lm_head\.weight is F8_E4M3",
    ),
]


@pytest.mark.parametrize("bad", BAD_WEIGHTS, ids=lambda bad: bad.name)
def test_wrong_weights_are_listed(bad: BadWeights, tensors: Tensors, tmp_path: Path) -> None:
    changed = dict(tensors)
    bad.change(changed)
    save_checkpoint(tmp_path, CASE.config, changed, shards=2)
    with pytest.raises(ValueError, match=bad.message):
        load(tmp_path)


def test_missing_corrupt_and_doubled_files(tensors: Tensors, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CASE.config, tensors, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is not a valid"):
        load(tmp_path)
    second.write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(ValueError, match="stored more than once"):
        load(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path)


def test_dummy_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CASE.config, {"unused": torch.zeros(1)})
    first, nextn = load(tmp_path, load_format="dummy", seed=5)
    again, _ = load(tmp_path, load_format="dummy", seed=5)
    other, _ = load(tmp_path, load_format="dummy", seed=6)
    assert_same_weights(first, again)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    for model in (first, nextn):
        assert all(tensor.isfinite().all() for tensor in weights_of(model).values())
    with pytest.raises(ValueError, match=r"load_format must be one of .*'pickle'"):
        load(tmp_path, load_format="pickle")


@pytest.mark.parametrize("saved_by_transformers", [True, False])
def test_config_is_read_alike_from_both_writers(saved_by_transformers: bool, tmp_path: Path) -> None:
    case = ModelCase("config", {"first_k_dense_replace": 2, "routed_scaling_factor": 1.75})
    if saved_by_transformers:
        reference_model(case).save_pretrained(tmp_path)
    else:
        save_checkpoint(tmp_path, case.config, {"unused": torch.zeros(1)})
    config = ModelConfig.from_path(str(tmp_path), dtype="float32")
    assert config.mlp_layer_types == ("dense", "dense", "sparse", "sparse")
    assert config.routed_scaling_factor == 1.75
    assert config.vocab_size == TINY["vocab_size"]
    assert config.rope.rope_theta == 10000.0
    assert config.eos_token_ids == (1,)
    assert config.context_len == 256


def test_eos_of_the_generation_config_comes_first(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TINY, {"unused": torch.zeros(1)})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert ModelConfig.from_path(str(tmp_path)).eos_token_ids == (3, 5)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert ModelConfig.from_path(str(tmp_path)).eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures must hold DeepseekV32.*'LlamaForCausalLM'"),
        ({"architectures": None}, "architectures must hold"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' or absent, got 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be None"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type must be 'default' or 'yarn', got 'llama3'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"hidden_size": "48"}, "hidden_size must be an integer, got '48'"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers must be 0 or 1, got 2"),
        ({"n_group": 3}, r"n_group must be a divisor of n_routed_experts \(8\).*got 3"),
        ({"topk_group": 5}, r"topk_group must be at most n_group \(4\), got 5"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most .*got 5"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types must hold 3 of"),
        ({"mlp_layer_types": ["dense", "sparse", "odd"]}, "mlp_layer_types must hold 3 of"),
        ({"eos_token_id": 97}, r"eos_token_ids must be in \[0, 97\), got \(97,\)"),
        ({"index_head_dim": 4}, r"index_head_dim must be at least qk_rope_head_dim \(8\), got 4"),
        ({"dtype": "float16"}, "dtype must be one of .*'float16'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configs_name_the_key_and_the_value(change: dict, message: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TINY | change, {"unused": torch.zeros(1)})
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_path(str(tmp_path))


def test_context_length_and_dtype_options(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TINY, {"unused": torch.zeros(1)})
    assert ModelConfig.from_path(str(tmp_path), context_length=100).context_len == 100
    assert ModelConfig.from_path(str(tmp_path)).dtype == torch.float32
    assert ModelConfig.from_path(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"context_len must be at most .*\(256\), got 257"):
        ModelConfig.from_path(str(tmp_path), context_length=257)
    with pytest.raises(ValueError, match="context_len must be at least 1, got 0"):
        ModelConfig.from_path(str(tmp_path), context_length=0)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_path(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got \[1\]"):
        ModelConfig.from_path(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ModelConfig.from_path(str(tmp_path / "nowhere"))


def test_what_transformers_saves_is_what_we_load(tmp_path: Path) -> None:
    """Also guards deepseek_names: transformers itself writes experts one by one."""
    case = ModelCase("names")
    theirs = reference_model(case)
    theirs.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == deepseek_names(theirs).keys()
