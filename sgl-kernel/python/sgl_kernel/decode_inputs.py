"""What a decode step's model reads of each request, generated on the device: planned once, run every step."""

from __future__ import annotations

import torch

from ._plan import Plan


class DecodeInputsPlan(Plan):
    """Writes the last token of every request, its position and its slot, in one launch.

    For request i with L = seq_lens[i] and row r = req_pool_indices[i]: positions[i] = L - 1, input_ids[i] =
    token_pool[r, L - 1], out_cache_loc[i] = req_to_token[r, L - 1]. Lengths, indices and tables are read on
    the device at every run, so that it may be a node of a captured graph. An index outside of the tables
    reads row 0, the row reserved for padding; a length below 1 counts as 1, one beyond the tables as their
    width. A captured graph does not own the plan: keep it as long as the graph.

    Args:
        bs: requests; 0 is nothing to do.
        seq_lens: [>= bs], int32 or int64: with the token that is decoded.
        req_pool_indices: [>= bs], int32 or int64.
        req_to_token: [pool, width], int32.
        token_pool: [pool, width], int32.
        input_ids, out_cache_loc, positions: [>= bs], int32; apart from each other and from what is read.
    """

    def __init__(
        self,
        *,
        bs: int,
        seq_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        token_pool: torch.Tensor,
        input_ids: torch.Tensor,
        out_cache_loc: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        super().__init__(
            seq_lens.device.type,
            "decode_inputs",
            bs,
            seq_lens,
            req_pool_indices,
            req_to_token,
            token_pool,
            input_ids,
            out_cache_loc,
            positions,
        )

    def run(self) -> None:
        """Writes the inputs, on the current stream."""
        self._enqueue()
