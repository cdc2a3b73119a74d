"""What changes the logits of requests that ask for it: penalties, biases, and the stops of min_new_tokens.

SGLang's rules, in this order: frequency and presence penalties are subtracted, the repetition penalty scales,
the bias is added, the stops are suppressed. All penalties look at the generated tokens, not at the prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from sglang.srt.sampling.sampling_params import SamplingParams

# Less likely than anything, and still a number: a row of nothing else has probabilities and logprobs.
SUPPRESSED = torch.finfo(torch.float32).min


class PenaltyPool:
    """Indexed by request, as the request pool is. A neutral request's logits stay as they are, to the bit.

    The tables are [rows, vocab]. Each is allocated when the first request comes that needs it, so a server
    whose requests ask for nothing has none of them.
    """

    def __init__(
        self, rows: int, vocab_size: int, eos_token_ids: Collection[int], device: torch.device | str
    ) -> None:
        self.size = (rows, vocab_size)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.device = device
        self.changed: set[int] = set()  # rows that are not neutral
        self.frequency = torch.zeros(rows, dtype=torch.float32, device=device)
        self.presence = torch.zeros(rows, dtype=torch.float32, device=device)
        self.repetition = torch.ones(rows, dtype=torch.float32, device=device)
        self.min_seq_len = torch.zeros(rows, dtype=torch.int64, device=device)  # before it no stop
        self.output_counts: torch.Tensor | None = None  # [rows, vocab], int32: of the generated tokens
        self.logit_bias: torch.Tensor | None = None  # [rows, vocab], float32
        self.stop_tokens: torch.Tensor | None = None  # [rows, vocab], bool

    def set_request(
        self, index: int, params: SamplingParams, prompt_len: int, output_ids: Sequence[int]
    ) -> None:
        """Sets a request's row, also that of one which was retracted and has generated `output_ids`."""
        if not params.changes_logits and index not in self.changed:
            return
        (self.changed.add if params.changes_logits else self.changed.discard)(index)
        self.frequency[index] = params.frequency_penalty
        self.presence[index] = params.presence_penalty
        self.repetition[index] = params.repetition_penalty
        self.min_seq_len[index] = prompt_len + params.min_new_tokens if params.min_new_tokens else 0
        if params.counts_outputs:
            self.output_counts = self._table(self.output_counts, torch.int32)
            ids = torch.tensor(output_ids, dtype=torch.int64)
            self.output_counts[index] = torch.bincount(ids, minlength=self.size[1]).to(self.device)
        if params.min_new_tokens:
            self.stop_tokens = self._table(self.stop_tokens, torch.bool)
            self.stop_tokens[index] = False
            stops = self.eos_token_ids.union(params.stop_token_ids)
            self.stop_tokens[index, torch.tensor(sorted(stops), dtype=torch.int64, device=self.device)] = True
        if params.logit_bias:
            self.logit_bias = self._table(self.logit_bias, torch.float32)
        if self.logit_bias is not None:  # which has no factor that could make it neutral
            tokens = [int(token) for token in params.logit_bias or {}]
            values = list((params.logit_bias or {}).values())
            self.logit_bias[index] = 0.0
            self.logit_bias[index, torch.tensor(tokens, dtype=torch.int64, device=self.device)] = (
                torch.tensor(values, dtype=torch.float32, device=self.device)
            )

    def apply(
        self,
        logits: torch.Tensor,  # [bs, rows, vocab], float32: changed in place
        positions: torch.Tensor,  # [bs, rows], int64: of the tokens to sample
        req_pool_indices: torch.Tensor,  # [bs]
        drafts: torch.Tensor | None = None,  # [bs, rows - 1], int64: row j comes after drafts 0 .. j - 1
    ) -> None:
        indices = req_pool_indices.long()
        counts = None if self.output_counts is None else self.output_counts[indices]  # [bs, vocab]
        bias = None if self.logit_bias is None else self.logit_bias[indices]
        stops = None if self.stop_tokens is None else self.stop_tokens[indices]
        frequency, presence, repetition = (
            factor[indices, None] for factor in (self.frequency, self.presence, self.repetition)
        )  # [bs, 1]
        too_early = positions < self.min_seq_len[indices, None]  # [bs, rows]
        for row in range(logits.shape[1]):
            scores = logits[:, row]  # [bs, vocab]
            if counts is not None:
                if row:
                    counts.scatter_add_(1, drafts[:, row - 1 : row], torch.ones_like(counts[:, :1]))
                seen = counts > 0
                scores -= counts * frequency + seen * presence
                scale = torch.where(seen, repetition, 1.0)
                scores.copy_(torch.where(scores < 0, scores * scale, scores / scale))
            if bias is not None:
                scores += bias
            if stops is not None:
                scores.masked_fill_(stops & too_early[:, row, None], SUPPRESSED)

    def add_outputs(
        self,
        req_pool_indices: torch.Tensor,  # [bs]
        tokens: torch.Tensor,  # [bs, rows], int64
        lens: torch.Tensor,  # [bs]: how many of a request's tokens it has generated
    ) -> None:
        if self.output_counts is None:
            return
        requests = req_pool_indices.long()[:, None].expand(tokens.shape)
        new = torch.arange(tokens.shape[1], device=tokens.device) < lens[:, None]  # [bs, rows]
        self.output_counts.index_put_((requests, tokens), new.to(torch.int32), accumulate=True)

    def _table(self, table: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self.size, dtype=dtype, device=self.device) if table is None else table
