"""What a verification decides."""

from __future__ import annotations

import torch


def count_accepted(draft_tokens: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
    """How many of the target's tokens [bs, D] a step may keep, given the drafts [bs, S = D - 1].

    Row j of the target was computed under drafts 1 .. j, so its token counts where all of these are what
    the target itself said; the token after the last right draft is the bonus. Returns [bs], int32, 1 .. D.
    Since a token's randomness depends on its position alone, this is what decoding without drafts says.
    """
    right = (draft_tokens == next_tokens[:, :-1]).to(torch.int32)  # [bs, S]
    return 1 + right.cumprod(dim=1).sum(dim=1, dtype=torch.int32)
