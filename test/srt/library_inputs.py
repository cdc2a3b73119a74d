"""What the tests of attention libraries run: DeepSeek-V3.2's dims, and inputs of sparse MLA."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.nsa.dims import AttentionDims

DEEPSEEK = AttentionDims(
    num_attention_heads=128,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    index_topk=2048,
    softmax_scale=192**-0.5,
    dtype=torch.bfloat16,
)


def random_inputs(rows: int, heads: int, topk: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * heads)
    q = torch.randn((rows, heads, 576), generator=generator).bfloat16()
    kv = torch.randn((4 * topk, 576), generator=generator).bfloat16()
    kv[0] = float("nan")  # nobody reads the slot of padded rows
    slots = torch.full((rows, topk), -1, dtype=torch.int32)
    for row in range(rows):
        n = (0, 1, topk // 3, topk)[row % 4]
        slots[row, :n] = torch.randperm(4 * topk - 1, generator=generator)[:n].int() + 1
    return q[..., :512], q[..., 512:], kv, slots
