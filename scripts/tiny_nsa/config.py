"""The shape of the model, under the names of a DeepSeek-V3.2 ``config.json``."""

from dataclasses import asdict, dataclass, replace

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIALS = (BOS, EOS, PAD)  # their ids are 0, 1, 2


@dataclass(frozen=True)
class ModelConfig:
    """Every width of the model. Field names are those of ``DeepseekV32Config``."""

    vocab_size: int = 512
    hidden_size: int = 256
    intermediate_size: int = 640
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 6
    first_k_dense_replace: int = 3
    num_attention_heads: int = 8
    q_lora_rank: int = 128
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    n_routed_experts: int = 4
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.5
    index_n_heads: int = 8
    index_head_dim: int = 32
    index_topk: int = 256
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` is a mixture of experts (the NextN layer, last in number, is)."""
        return layer >= self.first_k_dense_replace

    def quick(self) -> "ModelConfig":
        """The same architecture, small enough to train a few steps on a CPU."""
        return replace(
            self,
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            first_k_dense_replace=1,
            num_attention_heads=4,
            q_lora_rank=32,
            kv_lora_rank=32,
            index_topk=64,
            max_position_embeddings=256,
        )

    def to_hf(self) -> dict[str, object]:
        """``config.json`` as ``transformers`` 5 reads it, with DeepSeek's own rope keys beside it."""
        return {
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            **asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_scaling": None,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
