"""The trained network: DeepSeek-V3.2 in plain torch, parameters named as in its checkpoints."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, Drafts, Keys, rope_table
from .config import ModelConfig


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def one_of(chosen: Tensor, count: int) -> Tensor:
    """True at the columns that ``chosen`` names.  # [..., k], int64 -> [..., count], bool"""
    return (chosen[..., None] == torch.arange(count, device=chosen.device)).any(-2)


class Router(nn.Module):
    """Sigmoid scores, group-limited top-k, a selection bias and no balance loss (DeepSeek-V3, 2.1.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns each expert's weight, 0 where not chosen [..., experts], and each one's load [experts]."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if c.n_group > 1:
            groups = choice.unflatten(-1, (c.n_group, -1))
            best = groups.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
            kept = one_of(best, c.n_group)
            choice = groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
        chosen = choice.topk(c.num_experts_per_tok, dim=-1).indices
        picked = one_of(chosen, c.n_routed_experts).float()
        weights = scores * picked
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, picked.flatten(0, -2).mean(0)


class MoE(nn.Module):
    """Routed experts beside a shared one. Few and small experts: all are computed, unchosen ones weigh 0."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleList(MLP(hidden, inner) for _ in range(config.n_routed_experts))
        self.shared_experts = MLP(hidden, inner * config.n_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, load = self.gate(x)
        gate = F.linear(x, torch.cat([e.gate_proj.weight for e in self.experts]))
        up = F.linear(x, torch.cat([e.up_proj.weight for e in self.experts]))
        inner = (F.silu(gate) * up).unflatten(-1, (len(self.experts), -1)) * weights[..., None].to(gate.dtype)
        down = torch.cat([e.down_proj.weight for e in self.experts], dim=1)
        return F.linear(inner.flatten(-2), down) + self.shared_experts(x), load


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe(layer) else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mode: str,
        causal: Tensor | None = None,
        base: Keys | None = None,
        drafts: Drafts | None = None,
    ) -> tuple[Tensor, Keys | None, Tensor | None, Tensor | None]:
        """Returns the new hidden states, this call's keys, the indexer's loss and the experts' load."""
        normed = self.input_layernorm(x)
        attended, keys, loss = self.self_attn(normed, cos, sin, mode, causal, base, drafts)
        x = x + attended
        out, load = self.mlp(self.post_attention_layernorm(x)), None
        if isinstance(out, tuple):
            out, load = out
        return x + out, keys, loss, load


class NextN(nn.Module):
    """The MTP layer: from (hidden state of i, token i + 1) it predicts token i + 2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DecoderLayer(config, config.num_hidden_layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)  # stored as shared_head.norm

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))


class TinyNSA(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.nextn = NextN(config)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        depth = (2 * self.config.num_hidden_layers) ** -0.5  # for what adds to the residual stream
        for name, weight in self.named_parameters():
            if weight.dim() != 2:
                continue
            std = 0.02 if "embed" in name or "gate.weight" in name else 0.6 * weight.shape[1] ** -0.5
            nn.init.normal_(
                weight, std=std * (depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
            )
        eye = 0.5 * torch.eye(self.config.hidden_size)  # the MTP layer starts from the mean of its two inputs
        self.nextn.eh_proj.weight.mul_(0.1).add_(torch.cat([eye, eye], dim=1))

    def forward(self, tokens: Tensor, mode: str) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Runs the main model.

        Args:
            tokens: [b, t], int64.
            mode: ``dense``, ``warmup`` or ``sparse``.
        Returns:
            normed hidden states [b, t, hidden], the indexers' mean loss, and each MoE layer's load [experts].
        """
        t = tokens.shape[1]
        cos, sin = rope_table(torch.arange(t, device=tokens.device), self.config)
        causal = torch.ones(t, t, dtype=torch.bool, device=tokens.device).tril()
        x = self.embed_tokens(tokens)
        losses, loads = [], []
        for layer in self.layers:
            x, _, loss, load = layer(x, cos, sin, mode, causal)
            losses.append(loss if loss is not None else x.new_zeros(()))
            if load is not None:
                loads.append(load)
        return self.norm(x), torch.stack(losses).mean(), loads

    def draft(
        self,
        hidden: Tensor,
        tokens: Tensor,
        steps: int,
        rule: str,
        own_tokens: bool = False,
        mode: str = "sparse",
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Runs the MTP layer ``steps`` times from every position at once, exactly as serving does from one.

        Row i is the chain that starts once tokens 0..i are committed and token i + 1 is known. Step k feeds
        back the layer's own normed output with token i + k at position i + k - 1; it reads the keys that step
        1 wrote at 0..i (those come from the target's hidden states) and, under the rule ``step``, those of
        its own chain.

        Args:
            hidden: the target's normed hidden states, [b, t, hidden].
            tokens: [b, t] or longer, int64.
            rule: ``step`` or ``committed``.
            own_tokens: feed each chain the tokens it drafted itself instead of the text's.
            mode: ``dense`` works for a single step only.
        Returns:
            the logits of each step, [b, t, vocab] (step k of row i predicts token i + k + 1), the indexer's
            mean loss and the load of the experts. Row i of step k means something while token i + k is given.
        """
        if rule not in ("step", "committed"):
            raise ValueError(f"rule must be 'step' or 'committed', got {rule!r}")
        t, nextn = hidden.shape[1], self.nextn
        row = torch.arange(t, device=tokens.device)
        causal = row[:, None] >= row
        base, chain, logits, losses, loads = None, [], [], [], []
        for k in range(1, steps + 1):
            if own_tokens and k > 1:
                fed = logits[-1].argmax(-1)
            else:
                fed = tokens[:, (row + k).clamp(max=tokens.shape[1] - 1)]
            cos, sin = rope_table(row + k - 1, self.config)
            drafts = None
            if base is not None:  # always steps - 2 earlier slots, so that every step compiles to one graph
                live = [rule == "step" and j < len(chain) for j in range(steps - 2)] + [rule == "step"]
                dead = steps - 2 - len(chain)
                slots = chain + [Keys(*(part.clone() for part in base)) for _ in range(dead)]
                drafts = Drafts(slots, torch.tensor(live, device=tokens.device))
            x = nextn.join(self.embed_tokens(fed), hidden)
            x, keys, loss, load = nextn.layer(x, cos, sin, mode, causal, base, drafts)
            hidden = nextn.norm(x)
            logits.append(self.lm_head(hidden))
            losses.append(loss if loss is not None else x.new_zeros(()))
            loads.append(load)
            if base is None:
                base = keys
            else:
                chain.append(keys)
        return logits, torch.stack(losses).mean(), loads
