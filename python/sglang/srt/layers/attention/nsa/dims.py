"""The sizes of a model's sparse attention, and how an implementation says that it cannot serve them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class AttentionDims:
    """Names are those of the model's config."""

    num_attention_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    index_topk: int
    softmax_scale: float
    dtype: torch.dtype

    @classmethod
    def of(cls, config: object) -> AttentionDims:
        """Of a model's config, which has attributes of these names."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def require(self, implementation: str, **allowed: object) -> None:
        """Raises ValueError naming the first value that is not the allowed one."""
        for name, expected in allowed.items():
            found = getattr(self, name)
            if found != expected:
                raise ValueError(f"{implementation} needs {name} {expected}, got {found}")
