"""How many pages of the cache the device has memory for."""

from __future__ import annotations

import torch

from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs

_DEFAULT_CPU_TOKENS = 65536


def num_pages(
    args: ServerArgs,
    config: ModelConfig,
    kv_pool_class: type[MLATokenToKVPool],
    lookahead: int,  # slots past the committed length that a step writes
    device: torch.device,
) -> int:
    """The pages of `--max-total-tokens`, or of the memory that is free once the weights are loaded.

    Raises ValueError where not even one page fits.
    """
    tokens = args.max_total_tokens
    if tokens is None and device.type == "cpu":
        tokens = _DEFAULT_CPU_TOKENS
    if tokens is None:
        free, total = torch.cuda.mem_get_info(device)
        budget = free - total * (1 - args.mem_fraction_static)
        tokens = int(budget // bytes_per_token(config, kv_pool_class))
        # More than every request at full length is never used.
        tokens = min(tokens, args.max_running_requests * (config.context_len + lookahead))
    pages = tokens // args.page_size
    if pages < 1:
        raise ValueError(f"no memory for a single page: {tokens} tokens, page size {args.page_size}")
    return pages


def bytes_per_token(config: ModelConfig, kv_pool_class: type[MLATokenToKVPool]) -> int:
    """What the caches of all layers, the NextN layer's among them, hold of one token."""
    width, dtype = kv_pool_class.kv_format(config.kv_lora_rank, config.qk_rope_head_dim, config.dtype)
    per_layer = width * dtype.itemsize + config.index_head_dim * config.dtype.itemsize
    return per_layer * (config.num_hidden_layers + config.num_nextn_predict_layers)
