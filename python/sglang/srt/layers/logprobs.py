"""Log-probabilities of sampled and of prompt tokens, as requests ask for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang.srt.sampling.token_logprob import TokenLogprob

MAX_ROWS = 128  # of logits at once: 66 MB with a vocabulary of 129,280


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> list[TokenLogprob]:
    """Of each row of logits [R, vocab]: its token's logprob and the `top` most likely tokens'.

    They are those of the logits as given: of sampled tokens after penalties and biases, before temperature
    and filters. Reads back from the device.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1).tolist()
    if top:
        values, indices = (t.tolist() for t in logprobs.topk(top, dim=-1))
    else:
        values = indices = [[]] * len(chosen)
    return [
        TokenLogprob(token, logprob, list(zip(top_ids, top_values)))
        for token, logprob, top_ids, top_values in zip(token_ids.tolist(), chosen, indices, values)
    ]


def hidden_logprobs(
    hidden_states: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor,
    top: int,
) -> list[TokenLogprob]:
    """As `token_logprobs`, of hidden_states [R, hidden]: never more than MAX_ROWS rows of logits are there.

    All pieces have the same number of rows (the last starts early and drops what is known): a product's
    kernel, and with it the last bits, may depend on that number.
    """
    entries: list[TokenLogprob] = []
    for start in range(0, len(token_ids), MAX_ROWS):
        begin = max(0, min(start, len(token_ids) - MAX_ROWS))
        logits = compute_logits(hidden_states[begin : begin + MAX_ROWS])
        known = start - begin
        entries += token_logprobs(logits[known:], token_ids[start : start + MAX_ROWS], top)
    return entries
