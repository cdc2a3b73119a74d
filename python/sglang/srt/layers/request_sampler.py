"""Samples the rows of requests whose parameters lie in the request pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang.srt.layers.sampler import argmax_function, sample
from sglang.srt.layers.sampler_flashinfer import select_keep_mask
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool


class RequestSampler:
    """`backend` filters (`select_keep_mask`); raises where it is not available."""

    def __init__(self, pool: ReqToTokenPool, backend: str, device: torch.device) -> None:
        self.pool = pool
        self.keep_mask = select_keep_mask(backend, device)
        self.argmax = argmax_function(device)

    def __call__(
        self,
        logits: torch.Tensor,  # [bs * rows, vocab]; float32 where they are changed
        positions: torch.Tensor | None,  # [bs, rows], int64: of the tokens to sample; None with `GREEDY`
        req_pool_indices: torch.Tensor,  # [bs]
        info: SamplingBatchInfo,
        drafts: torch.Tensor | None = None,  # [bs, rows - 1], int64: row j comes after drafts 0 .. j - 1
    ) -> torch.Tensor:  # [bs, rows], int64
        """Where penalties, biases or min_new_tokens are set, `logits` are changed in place."""
        if info.changes_logits:
            rows = logits.view(*positions.shape, -1)
            self.pool.penalties.apply(rows, positions, req_pool_indices, drafts)
        if info.all_greedy:
            return self.argmax(logits).view(req_pool_indices.shape[0], -1)
        requests = req_pool_indices.long()[:, None].expand(positions.shape).reshape(-1)
        params = self.pool.sampling_params(requests)
        tokens = sample(
            logits.float(),
            positions.reshape(-1),
            *params,
            needs_filter=info.needs_filter,
            keep=self.keep_mask,
        )
        return tokens.view(positions.shape)
