"""The filters of sampling (top-k, top-p) by FlashInfer, which selects without sorting the vocabulary.

Only the filters: which of the tokens that are left is drawn remains a function of (seed, position, token).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from sglang.srt.layers.sampler import keep_mask
from sglang.srt.libraries.flashinfer import load_flashinfer

logger = logging.getLogger(__name__)

KeepMask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def select_keep_mask(name: str, device: torch.device) -> KeepMask:
    """`sampler.keep_mask`, or its equal by FlashInfer; 'auto' is flashinfer on CUDA where it is installed.

    Raises ValueError for another name and ImportError where flashinfer, asked for by name, is not available.
    """
    if name not in ("auto", "torch", "flashinfer"):
        raise ValueError(f"sampling backend must be auto, torch or flashinfer, got {name!r}")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return keep_mask
    logger.info("sampling: loading flashinfer's kernels, which its first start compiles in a minute or two")
    try:
        chosen = FlashInferKeepMask(device)
    except ImportError as error:
        if name == "flashinfer":
            raise ImportError(f"sampling backend flashinfer: {error}") from error
        logger.info("sampling: auto chose torch: %s", error)
        return keep_mask
    logger.info("sampling: %s", "auto chose flashinfer" if name == "auto" else name)
    return chosen


class FlashInferKeepMask:
    """`sampler.keep_mask` by FlashInfer.

    The same rules, but where tokens of equal probability straddle a limit it keeps all of them, and sums of
    probabilities are rounded differently. Deterministic, and no row depends on another.
    """

    def __init__(self, device: torch.device) -> None:
        self.sampling = load_flashinfer("sampling")
        ones = torch.ones(1, device=device)
        try:  # compiles the kernels where the package brings no binary
            self(torch.zeros((1, 8), device=device), 0.5 * ones, 4 * ones.long(), 0 * ones)
        except (RuntimeError, OSError) as error:
            raise ImportError(f"flashinfer's sampling kernels do not run: {error}") from error

    def __call__(
        self,
        scores: torch.Tensor,  # [R, V], float32
        top_p: torch.Tensor,  # [R], float32
        top_k: torch.Tensor,  # [R], int64: 0 is off
        min_p: torch.Tensor,  # [R], float32
    ) -> torch.Tensor:
        """Which tokens may be sampled: [R, V], bool."""
        probs = scores.softmax(dim=-1)
        top = probs.amax(dim=-1, keepdim=True)
        vocab = scores.shape[1]
        no_k, no_p = (top_k <= 0) | (top_k >= vocab), top_p >= 1
        k = torch.where(no_k, vocab, top_k).to(torch.int32)
        p = torch.where(no_p, 0.5, top_p)  # its limits are below 1
        keep = (self.sampling.top_k_renorm_probs(probs, k) > 0) | no_k[:, None]
        keep &= (self.sampling.top_p_renorm_probs(probs, p, is_deterministic=True) > 0) | no_p[:, None]
        keep &= probs >= min_p[:, None] * top
        return keep | (probs == top)  # whatever the limits, the most likely stays
