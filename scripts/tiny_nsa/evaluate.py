"""Measurements on held-out text: bits per byte, dense and sparse, and the accept length of speculation."""

import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Drafts, Keys, rope_table
from .model import TinyNSA


@torch.no_grad()
def bits_per_byte(
    model: TinyNSA, stream: Tensor, sizes: Tensor, length: int, mode: str, windows: int | None = None
) -> float:
    """Bits per byte of text over consecutive windows, each read from its own beginning.

    Args:
        stream: held-out tokens, [n], int64.
        sizes: bytes of each token of the vocabulary, [vocab], float32.
        length: tokens a window predicts.
        windows: how many windows, spread evenly; all where left out.
    """
    starts = torch.arange(0, len(stream) - length, length)
    if windows is not None and windows < len(starts):
        starts = starts[torch.linspace(0, len(starts) - 1, windows).long()]
    nats, size = 0.0, 0.0
    for at in starts.split(max(1, 8192 // length)):
        tokens = stream[(at[:, None] + torch.arange(length + 1)).to(stream.device)]
        hidden, _, _ = model(tokens[:, :-1], mode)
        target = tokens[:, 1:].flatten()
        nats += F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), target, reduction="sum").item()
        size += sizes[target].sum().item()
    return nats / math.log(2) / size


@torch.no_grad()
def generate(model: TinyNSA, prompts: Tensor, new: int, temperature: float = 0.0) -> Tensor:
    """Continues equally long ``prompts`` ([b, t], int64) with sparse attention over cached keys.

    Greedily where ``temperature`` is 0. Returns [b, t + new], int64.
    """
    b, t = prompts.shape
    tokens = torch.cat([prompts, prompts.new_zeros(b, new)], dim=1)
    row = torch.arange(t + new, device=prompts.device)
    cos, sin = rope_table(row, model.config)
    x, causal = model.embed_tokens(prompts), row[:t, None] >= row[:t]
    caches: list[Keys] = []
    for layer in model.layers:
        x, keys, _, _ = layer(x, cos[:t], sin[:t], "sparse", causal)
        caches.append(Keys(*(F.pad(part, (0, 0, 0, new)) for part in keys)))
    own = Drafts([], torch.ones(1, dtype=torch.bool, device=prompts.device))
    for n in range(t, t + new):
        logits = model.lm_head(model.norm(x[:, -1])).float()
        if temperature > 0:
            tokens[:, n] = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        else:
            tokens[:, n] = logits.argmax(-1)
        if n == t + new - 1:
            break
        x = model.embed_tokens(tokens[:, n : n + 1])
        readable = torch.ones(1, n, dtype=torch.bool, device=prompts.device)
        for layer, cache in zip(model.layers, caches, strict=True):
            base = Keys(cache.k[:, :, :n], cache.v[:, :, :n], cache.index_k[:, :n])
            x, keys, _, _ = layer(x, cos[n : n + 1], sin[n : n + 1], "sparse", readable, base, own)
            cache.k[:, :, n], cache.v[:, :, n] = keys.k[:, :, 0], keys.v[:, :, 0]
            cache.index_k[:, n] = keys.index_k[:, 0]
    return tokens


@torch.no_grad()
def accepted_drafts(model: TinyNSA, tokens: Tensor, steps: int, rule: str) -> Tensor:
    """How many of the drafts made after each position agree with ``tokens``.

    ``tokens`` ([b, t], int64) must be what the target decodes greedily after the positions asked about.
    Returns [b, t - steps - 1], int64, 0..steps.
    """
    hidden, _, _ = model(tokens, "sparse")
    logits, _, _ = model.draft(hidden, tokens, steps, rule, own_tokens=True)
    rows = tokens.shape[1] - steps - 1
    right = torch.stack(
        [part[:, :rows].argmax(-1) == tokens[:, k + 2 : k + 2 + rows] for k, part in enumerate(logits)]
    )
    return right.int().cumprod(0).sum(0)


def accept_length(
    model: TinyNSA, prompts: list[list[int]], new: int, steps: int, rules: tuple[str, ...]
) -> dict[str, float]:
    """Mean tokens per verify, the bonus token included, of greedy decoding with ``steps`` drafts per verify.

    Every verify accepts the drafts that equal the target's greedy choice, and one token more; the next chain
    starts behind it. Prompts of equal length run as one batch.
    """
    groups: dict[int, list[list[int]]] = defaultdict(list)
    for prompt in prompts:
        groups[len(prompt)].append(prompt)
    tokens_out, verifies = dict.fromkeys(rules, 0), dict.fromkeys(rules, 0)
    for length, group in sorted(groups.items()):
        batch = torch.tensor(group, device=model.norm.weight.device)
        # the last chains look steps + 1 tokens further than what is counted
        decoded = generate(model, batch, new + steps + 1)
        for rule in rules:
            accepted = accepted_drafts(model, decoded, steps, rule).tolist()
            for row in accepted:
                at, end = length - 1, length - 1 + new
                while at < end and at < len(row):
                    tokens_out[rule] += row[at] + 1
                    verifies[rule] += 1
                    at += row[at] + 1
    return {rule: tokens_out[rule] / verifies[rule] for rule in rules}
