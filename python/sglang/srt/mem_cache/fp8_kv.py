"""The FP8 form of a cached key that FlashMLA's decode kernel reads: 656 bytes.

512 latents as float8 (e4m3) in four tiles of 128, each tile's scale in float32, and 64 rotated values in
bfloat16. Source of the layout: FlashMLA's README, "FP8 KV cache".
"""

from __future__ import annotations

import torch

LATENT, ROPE, TILE = 512, 64, 128
TILES = LATENT // TILE
SCALES_END = LATENT + 4 * TILES
BYTES = SCALES_END + 2 * ROPE
PAGE = 64  # slots; what FlashMLA takes for one block
FP8_MAX = 448.0


def quantize_kv(kv_latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    """kv_latent [T, 512] and k_rope [T, 64] -> [T, 656], uint8."""
    rows = kv_latent.shape[0]
    tiles = kv_latent.float().view(rows, TILES, TILE)
    largest = tiles.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest > 0, largest / FP8_MAX, 1.0)  # [T, 4, 1]
    packed = torch.empty((rows, BYTES), dtype=torch.uint8, device=kv_latent.device)
    packed[:, :LATENT] = (tiles / scales).to(torch.float8_e4m3fn).view(rows, LATENT).view(torch.uint8)
    packed[:, LATENT:SCALES_END] = scales.view(rows, TILES).view(torch.uint8)
    packed[:, SCALES_END:] = k_rope.to(torch.bfloat16).contiguous().view(torch.uint8)
    return packed


def dequantize_kv(packed: torch.Tensor) -> torch.Tensor:
    """[slots, 656], uint8 -> [slots, 576], float32: latents, then rotated values."""
    slots = packed.shape[0]
    latents = packed[:, :LATENT].contiguous().view(torch.float8_e4m3fn).float().view(slots, TILES, TILE)
    scales = packed[:, LATENT:SCALES_END].contiguous().view(torch.float32)
    rope = packed[:, SCALES_END:].contiguous().view(torch.bfloat16).float()
    return torch.cat(((latents * scales[:, :, None]).view(slots, LATENT), rope), dim=1)
