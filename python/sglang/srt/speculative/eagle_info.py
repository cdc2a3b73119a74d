"""What a verification decides, and how far it moves the requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang.srt.layers.triton_kernels import runs_triton

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.model_executor.graph_runner import StepInputs


def count_accepted(draft_tokens: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
    """How many of the target's tokens [bs, D] a step may keep, given the drafts [bs, S = D - 1].

    Row j of the target was computed under drafts 1 .. j, so its token counts where all of these are what
    the target itself said; the token after the last right draft is the bonus. Returns [bs], int32, 1 .. D.
    Since a token's randomness depends on its position alone, this is what decoding without drafts says.
    """
    right = (draft_tokens == next_tokens[:, :-1]).to(torch.int32)  # [bs, S]
    return 1 + right.cumprod(dim=1).sum(dim=1, dtype=torch.int32)


def advance(tokens: torch.Tensor, step: StepInputs, pool: ReqToTokenPool) -> None:
    """Keeps what counts of the target's tokens [bs, D], in the step's tensors and in the pool's. Padding
    accepts nothing."""
    results = (step.output, step.accept_lens, step.extend_seq_lens, step.last_rows)
    if runs_triton(tokens.device):
        from sglang.srt.layers.triton_kernels.accept import accept

        inputs = (tokens, step.draft_tokens, step.req_pool_indices, step.seq_lens)
        accept(*inputs, *results, pool.seq_lens, pool.last_token)
        return
    rows = torch.arange(0, tokens.numel(), tokens.shape[1], device=tokens.device)
    indices = step.req_pool_indices.long()
    accepted = count_accepted(step.draft_tokens, tokens) * (indices > 0)
    torch.cat((tokens, accepted[:, None]), dim=1, out=step.output)
    step.accept_lens.copy_(accepted)
    torch.add(step.seq_lens, accepted, out=step.extend_seq_lens)
    torch.add(rows, (accepted.long() - 1).clamp(min=0), out=step.last_rows)
    pool.seq_lens.index_copy_(0, indices, step.extend_seq_lens)
    pool.last_token.index_copy_(0, indices, tokens.flatten()[step.last_rows])
