"""What the arguments, the environment and the model say about the attention backends."""

from __future__ import annotations

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.attention.nsa.dims import AttentionDims
from sglang.srt.layers.attention.nsa.paths import MetadataSelection
from sglang.srt.layers.attention.nsa_backend import NSAConfig
from sglang.srt.layers.attention.registry import select_attention_ops
from sglang.srt.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs


def attention_config(args: ServerArgs, config: ModelConfig, width: int, device: torch.device) -> NSAConfig:
    """`width` is the number of columns of a page table. Raises where a backend asked for cannot serve."""
    selection = MetadataSelection(
        enabled=envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA.get(),
        layout=args.nsa_metadata_layout,
        copy=args.nsa_metadata_copy,
        draft_seqlens=args.nsa_draft_seqlens,
        check_replays=envs.SGLANG_NSA_VERIFY_METADATA.get(),
    )
    dims = AttentionDims.of(config)
    return NSAConfig(
        topk=config.index_topk,
        page_size=args.page_size,
        width=width,
        device=device,
        selection=selection,
        prefill_ops=select_attention_ops(args.nsa_prefill_backend, device, "prefill", dims),
        decode_ops=select_attention_ops(args.nsa_decode_backend, device, "decode", dims),
    )
