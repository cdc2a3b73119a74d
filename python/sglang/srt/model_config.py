"""What the runtime needs to know of a model: a frozen view of its `config.json`.

The file is read directly, not through transformers' config class, because only recent releases have that
class. Names and defaults are DeepSeek-V3.2's.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

ARCHITECTURE = "DeepseekV32ForCausalLM"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Keys with one supported value. A config that leaves one out means that value.
FIXED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "mlp_bias": False,
    "rope_interleave": True,
    "indexer_rope_interleave": False,
    "quantization_config": None,
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: plain, or YaRN when `factor` is above 1."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    original_max_position_embeddings: int = 163840
    truncate: bool = True

    @property
    def cos_sin_scale(self) -> float:
        """The factor on cos and sin (YaRN, https://arxiv.org/abs/2309.00071, with DeepSeek's two mscales)."""
        if self.rope_type == "default":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    @property
    def softmax_mscale(self) -> float:
        """The factor on the softmax scale."""
        if self.rope_type == "default" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3.2 model. Fields up to `rope` carry the names of `config.json`."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 163840
    initializer_range: float = 0.02
    bos_token_id: int | None = 0

    rope: RopeConfig = RopeConfig()
    # "dense" or "sparse", one per layer: num_hidden_layers, then the NextN layer
    mlp_layer_types: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    model_path: str = ""
    context_len: int = 163840
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def softmax_scale(self) -> float:
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * self.rope.softmax_mscale

    @classmethod
    def from_path(
        cls,
        model_path: str,
        context_length: int | None = None,
        dtype: str = "auto",
        device: str = "cpu",
    ) -> ModelConfig:
        """Reads `config.json` and `generation_config.json` in the folder `model_path`.

        `context_length` None means the model's own; `dtype` "auto" means the checkpoint's. Raises ValueError
        naming the first key that is wrong or not supported, and FileNotFoundError without a config.
        """
        path = Path(model_path) / "config.json"
        raw = _read_json(path)
        try:
            return cls._from_raw(raw, model_path, context_length, dtype, device)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _from_raw(
        cls, raw: dict[str, Any], model_path: str, context_length: int | None, dtype: str, device: str
    ) -> ModelConfig:
        _check_supported(raw)
        _check_types(raw, cls, ("rope", "mlp_layer_types", "eos_token_ids", "dtype", "device"))
        values = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        values = {k: v for k, v in values.items() if k not in ("rope", "mlp_layer_types", "dtype", "device")}
        base = cls(**values)
        generation = Path(model_path) / "generation_config.json"
        eos = raw.get("eos_token_id", 1)
        if generation.exists():
            stored = _read_json(generation).get("eos_token_id")
            eos = eos if stored is None else stored
        config = cls(
            **values,
            rope=_parse_rope(raw, base.max_position_embeddings),
            mlp_layer_types=_parse_mlp_layer_types(raw, base),
            eos_token_ids=_parse_eos(eos),
            model_path=str(model_path),
            context_len=base.max_position_embeddings if context_length is None else context_length,
            dtype=_parse_dtype(dtype, raw),
            device=device,
        )
        config._validate()
        return config

    def _validate(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"config: {f.name} must be an integer, got {value!r}")
            if f.type == "int" and value < 1 and f.name not in MAY_BE_ZERO:
                raise ValueError(f"config: {f.name} must be at least 1, got {value}")
        checks = (
            ("num_nextn_predict_layers", self.num_nextn_predict_layers in (0, 1), "0 or 1"),
            ("first_k_dense_replace", self.first_k_dense_replace >= 0, "at least 0"),
            ("n_shared_experts", self.n_shared_experts >= 0, "at least 0"),
            ("qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "even"),
            (
                "index_head_dim",
                self.index_head_dim >= self.qk_rope_head_dim,
                f"at least qk_rope_head_dim ({self.qk_rope_head_dim})",
            ),
            (
                "n_group",
                self.n_routed_experts % self.n_group == 0 and self.n_routed_experts // self.n_group >= 2,
                f"a divisor of n_routed_experts ({self.n_routed_experts}) that leaves groups of 2 or more",
            ),
            ("topk_group", self.topk_group <= self.n_group, f"at most n_group ({self.n_group})"),
            (
                "num_experts_per_tok",
                self.num_experts_per_tok <= self.topk_group * self.n_routed_experts // self.n_group,
                "at most the experts of topk_group groups",
            ),
            (
                "context_len",
                self.context_len <= self.max_position_embeddings,
                f"at most max_position_embeddings ({self.max_position_embeddings})",
            ),
            (
                "eos_token_ids",
                all(0 <= t < self.vocab_size for t in self.eos_token_ids),
                f"in [0, {self.vocab_size})",
            ),
        )
        for name, ok, expected in checks:
            if not ok:
                raise ValueError(f"config: {name} must be {expected}, got {getattr(self, name)!r}")


JSON_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a string"),
}


def _check_types(raw: dict[str, Any], kind: type, others: tuple[str, ...] = ()) -> None:
    """Raises ValueError naming the first key of a field of `kind` whose value is of another type."""
    for f in fields(kind):
        value, wanted = raw.get(f.name), str(f.type).partition(" |")[0]
        if value is None or f.name in others:
            continue
        allowed, words = JSON_TYPES[wanted]
        if not isinstance(value, allowed) or (wanted != "bool" and isinstance(value, bool)):
            raise ValueError(f"config: {f.name} must be {words}, got {value!r:.80}")


def _check(raw: dict[str, Any], name: str, is_right: bool, words: str) -> None:
    if not is_right:
        raise ValueError(f"config: {name} must be {words}, got {raw.get(name)!r:.80}")


MAY_BE_ZERO = ("num_nextn_predict_layers", "first_k_dense_replace", "n_shared_experts")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"model path has no {path.name}: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {content!r:.80}")
    return content


def _check_supported(raw: dict[str, Any]) -> None:
    architectures = raw.get("architectures") or []
    _check(raw, "architectures", isinstance(architectures, list), "a list")
    if ARCHITECTURE not in architectures:
        raise ValueError(f"config: architectures must hold {ARCHITECTURE}, got {architectures!r}")
    for name, supported in FIXED_VALUES.items():
        value = raw.get(name)
        if value is not None and value != supported:
            raise ValueError(f"config: {name} must be {supported!r} or absent, got {value!r}")


def _parse_rope(raw: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_scaling` beside `rope_theta` (DeepSeek)."""
    for name in ("rope_parameters", "rope_scaling"):
        _check(raw, name, isinstance(raw.get(name) or {}, dict), "an object")
    table = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    _check_types(raw | table, RopeConfig)
    table.setdefault("rope_type", table.pop("type", "default"))
    if table.get("rope_theta") is None:
        table["rope_theta"] = raw.get("rope_theta") or RopeConfig.rope_theta
    if table["rope_type"] not in ("default", "yarn"):
        raise ValueError(f"config: rope_type must be 'default' or 'yarn', got {table['rope_type']!r}")
    if table["rope_type"] == "default":
        return RopeConfig(rope_theta=float(table["rope_theta"]))
    if table.get("original_max_position_embeddings") is None:
        table["original_max_position_embeddings"] = max_position_embeddings
    if table.get("factor") is None:
        table["factor"] = max_position_embeddings / table["original_max_position_embeddings"]
    known = {f.name: table[f.name] for f in fields(RopeConfig) if table.get(f.name) is not None}
    return RopeConfig(**known)


def _parse_mlp_layer_types(raw: dict[str, Any], base: ModelConfig) -> tuple[str, ...]:
    """One entry a layer and one for the NextN layer, which is like the last layer unless the config says."""
    layers = base.num_hidden_layers
    given = raw.get("mlp_layer_types")
    if given is None:
        dense = base.first_k_dense_replace
        return tuple("dense" if i < dense else "sparse" for i in range(layers + 1))
    _check(raw, "mlp_layer_types", _is_list_of(given, str), "a list of strings")
    if len(given) not in (layers, layers + base.num_nextn_predict_layers) or set(given) - {"dense", "sparse"}:
        raise ValueError(f"config: mlp_layer_types must hold {layers} of 'dense' or 'sparse', got {given!r}")
    return tuple(given) if len(given) > layers else (*given, given[-1])


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _parse_eos(eos: int | list[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    _check(
        {"eos_token_id": eos}, "eos_token_id", _is_list_of([eos], int) or _is_list_of(eos, int), "token ids"
    )
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _parse_dtype(dtype: str, raw: dict[str, Any]) -> torch.dtype:
    name = dtype if dtype != "auto" else raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {name!r} (--dtype {dtype})")
    return DTYPES[name]
