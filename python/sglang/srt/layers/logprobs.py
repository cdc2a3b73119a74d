"""Log-probabilities of sampled and of prompt tokens, as requests ask for them."""

from __future__ import annotations

import torch

from sglang.srt.sampling.token_logprob import TokenLogprob


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> list[TokenLogprob]:
    """Of each row of logits [R, vocab], float32: its token's logprob and the `top` most likely tokens'.

    They are those of the logits as given: of sampled tokens after penalties and biases, before temperature
    and filters. Reads back from the device.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1).tolist()
    if top:
        values, indices = (t.tolist() for t in logprobs.topk(top, dim=-1))
    else:
        values = indices = [[]] * len(chosen)
    return [
        TokenLogprob(token, logprob, list(zip(top_ids, top_values)))
        for token, logprob, top_ids, top_values in zip(token_ids.tolist(), chosen, indices, values)
    ]
