"""MLA with the lightning indexer, in plain torch, as ``transformers`` 5.23 computes it.

Three ways to run it: ``dense`` (every earlier key, the fast attention of torch), ``warmup`` (dense, and the
indexer learns the attention distribution) and ``sparse`` (the indexer's top-k only; it goes on learning). The
indexer's loss follows the DeepSeek-V3.2 report, section 2.1; its inputs are detached: it trains nothing else.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


def rope_table(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine for ``positions`` ([t], int64).  # two of [t, rope / 2], float32"""
    dim = config.qk_rope_head_dim
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angle = positions[:, None].float() * config.rope_theta**-exponent
    return angle.cos(), angle.sin()


def rotate(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (first, second).  # [..., t, rope / 2] each -> [..., t, rope]"""
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Keys(NamedTuple):
    """What later queries read of a token."""

    k: Tensor  # [b, heads, t, qk]
    v: Tensor  # [b, heads, t, v]
    index_k: Tensor  # [b, t, index_dim]


class Drafts(NamedTuple):
    """Keys of each row's own draft chain: row i of slot j is what draft j of chain i wrote.

    ``live`` says which slots exist at this step, the query's own (last) included; all false is the
    ``committed`` rule, in which a draft sees committed positions only.
    """

    keys: list[Keys]
    live: Tensor  # [len(keys) + 1], bool


class Indexer(nn.Module):
    """``score[s, t] = sum_h w[s, h] * relu(q[s, h] . k[t] * dim^-0.5)``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wq_b = nn.Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, config.index_head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.index_head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, config.index_n_heads, bias=False)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rope = self.config.qk_rope_head_dim
        half = rope // 2
        return torch.cat([rotate(x[..., :half], x[..., half:rope], cos, sin), x[..., rope:]], dim=-1)

    def project(self, x: Tensor, q_resid: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q [b, heads, t, dim], k [b, t, dim] and the head weights [b, heads, t, 1]."""
        heads = self.config.index_n_heads
        q = self.wq_b(q_resid).unflatten(-1, (heads, -1)).transpose(1, 2)
        weights = self.weights_proj(x).float() * heads**-0.5
        return self.rope(q, cos, sin), self.rope(self.k_norm(self.wk(x)), cos, sin), weights.mT[..., None]

    def score(self, q: Tensor, weights: Tensor, base: Tensor, drafts: Tensor | None) -> Tensor:
        """Scores of ``base`` ([b, tk, dim]) and of the slots ([b, t, j, dim]).  # [b, t, tk + j], float32"""
        dots = q @ base[:, None].mT
        if drafts is not None:
            dots = torch.cat([dots, torch.einsum("bhtd,btjd->bhtj", q, drafts)], dim=-1)
        return (F.relu(dots.float() * self.config.index_head_dim**-0.5) * weights).sum(1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=1e-6)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)
        self.indexer = Indexer(config)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns q_resid [b, t, q_lora], q [b, heads, t, qk], k [b, heads, t, qk] and v [b, heads, t, v]."""
        c = self.config
        nope, rope, heads = c.qk_nope_head_dim, c.qk_rope_head_dim, c.num_attention_heads
        q_resid = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_resid).unflatten(-1, (heads, -1)).transpose(1, 2)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([nope, c.v_head_dim], dim=-1)
        q_rope = rotate(q[..., nope::2], q[..., nope + 1 :: 2], cos, sin).to(q.dtype)
        k_rope = rotate(k_rope[..., 0::2], k_rope[..., 1::2], cos, sin).to(q.dtype)
        q = torch.cat([q[..., :nope], q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, heads, -1, -1)], dim=-1)
        return q_resid, q, k, v

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mode: str,
        causal: Tensor | None = None,
        base: Keys | None = None,
        drafts: Drafts | None = None,
    ) -> tuple[Tensor, Keys | None, Tensor | None]:
        """Attends ``x`` ([b, t, hidden]) to itself, or to ``base`` and its draft chain.

        Args:
            causal: which base keys each query may read ([t, tk], bool); needed except in ``dense`` mode.
            base: keys of committed positions; the query's own where left out.
            drafts: earlier slots of the chain; the query's own key becomes the last slot.
        Returns:
            the output [b, t, hidden], this call's own keys, and the indexer's loss (a scalar, if gradients
            are recorded).
        """
        q_resid, q, k, v = self.project(x, cos, sin)
        if mode == "dense":
            pad = q.shape[-1] - v.shape[-1]  # the fused attention wants equal widths
            out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, pad)), is_causal=True)
            return self.o_proj(out[..., : v.shape[-1]].transpose(1, 2).flatten(2)), None, None
        index_q, index_k, weights = self.indexer.project(x.detach(), q_resid.detach(), cos, sin)
        own = Keys(k, v, index_k)
        if base is None:
            base = own
        logits = q @ base.k.mT
        slots_v, slots_index = None, None
        if drafts is not None:
            slots = [*drafts.keys, own]
            slots_k = torch.stack([s.k for s in slots], dim=3)  # [b, heads, t, j, qk]
            slots_v = torch.stack([s.v for s in slots], dim=3)
            slots_index = torch.stack([s.index_k for s in slots], dim=2)
            logits = torch.cat([logits, torch.einsum("bhtd,bhtjd->bhtj", q, slots_k)], dim=-1)
            causal = torch.cat([causal, drafts.live.expand(len(causal), -1)], dim=-1)
        scores = self.indexer.score(index_q, weights, base.index_k.detach(), slots_index)
        scores = scores.masked_fill(~causal, float("-inf"))
        mask = causal if mode == "warmup" else top_k_mask(scores, self.config.index_topk) & causal
        logits = logits.float() * q.shape[-1] ** -0.5
        probs = softmax_where(mask.unsqueeze(-3), logits)
        out = probs[..., : base.v.shape[2]].to(v.dtype) @ base.v
        if slots_v is not None:
            out = out + torch.einsum("bhtj,bhtjd->bhtd", probs[..., base.v.shape[2] :].to(v.dtype), slots_v)
        loss = None
        if torch.is_grad_enabled():
            # unlike the report's second stage, the target stays the whole distribution: with so few keys
            # selected, an indexer that is told only about those would never learn of the ones it misses
            whole = probs.detach() if mode == "warmup" else softmax_where(causal, logits.detach())
            loss = indexer_loss(scores, whole.mean(1), causal)
        return self.o_proj(out.transpose(1, 2).flatten(2)), own, loss


def softmax_where(mask: Tensor, logits: Tensor) -> Tensor:
    """Softmax over the last dimension where ``mask`` is true, 0 elsewhere."""
    return logits.masked_fill(~mask, float("-inf")).softmax(-1)


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """True at the ``k`` best keys of each row, lower columns first among equals, as the runtime selects.

    Everywhere where there are no more than ``k``. By comparisons, since a scatter that must be deterministic
    sorts all its indices.
    """
    if scores.shape[-1] <= k:
        return torch.ones_like(scores, dtype=torch.bool)
    scores = scores.detach()
    edge = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > edge, scores == edge
    room = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def indexer_loss(scores: Tensor, target: Tensor, causal: Tensor) -> Tensor:
    """Mean KL of the indexer's softmax from ``target``, the attention averaged over heads ([b, t, tk])."""
    log_q = scores.log_softmax(-1).masked_fill(~causal, 0.0)
    return (target * ((target + 1e-9).log() - log_q)).sum(-1).mean()
