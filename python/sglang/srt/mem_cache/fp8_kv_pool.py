"""The cache that FlashMLA's decode kernel reads: keys in FP8, quantized as they are written."""

from __future__ import annotations

import torch

from sglang.srt.mem_cache.fp8_kv import BYTES, LATENT, PAGE, ROPE, quantize_kv
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.server_args import ServerArgs


class FP8MLATokenToKVPool(MLATokenToKVPool):
    """`kv_buffer` holds 656 bytes a slot (`fp8_kv.py`)."""

    stores_rows = False

    @staticmethod
    def kv_format(kv_lora_rank: int, qk_rope_head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        if (kv_lora_rank, qk_rope_head_dim) != (LATENT, ROPE):
            raise ValueError(
                f"the FP8 cache needs kv_lora_rank {LATENT} and qk_rope_head_dim {ROPE}, "
                f"got {kv_lora_rank} and {qk_rope_head_dim}"
            )
        return BYTES, torch.uint8

    def set_mla_kv_buffer(
        self, layer_id: int, loc: torch.Tensor, kv_latent: torch.Tensor, k_rope: torch.Tensor
    ) -> None:
        self.kv_buffer[layer_id].index_copy_(0, loc, quantize_kv(kv_latent, k_rope))


def kv_pool_class(args: ServerArgs) -> type[MLATokenToKVPool]:
    """The cache that the chosen implementations read. Raises ValueError where they read different ones."""
    fp8 = [backend == "flashmla_kv" for backend in (args.nsa_prefill_backend, args.nsa_decode_backend)]
    if not any(fp8):
        return MLATokenToKVPool
    if not all(fp8):
        raise ValueError(
            "flashmla_kv reads a cache in FP8, so it must be both --nsa-prefill-backend and "
            f"--nsa-decode-backend, got {args.nsa_prefill_backend} and {args.nsa_decode_backend}"
        )
    if args.page_size % PAGE:
        raise ValueError(f"flashmla_kv needs --page-size a multiple of {PAGE}, got {args.page_size}")
    return FP8MLATokenToKVPool
