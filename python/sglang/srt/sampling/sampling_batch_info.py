"""What the host knows of a batch's sampling parameters, so that the device does no work in vain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.sampling.sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplingBatchInfo:
    """Promises about all requests of a batch; the parameters themselves lie in the request pool."""

    all_greedy: bool
    needs_filter: bool  # some request has top_p, top_k or min_p set
    changes_logits: bool  # some request has a penalty, a bias or min_new_tokens set

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> SamplingBatchInfo:
        return cls(
            all_greedy=all(p.temperature == 0 for p in params),
            needs_filter=any(p.temperature > 0 and p.filters for p in params),
            changes_logits=any(p.changes_logits for p in params),
        )


GREEDY = SamplingBatchInfo(all_greedy=True, needs_filter=False, changes_logits=False)
# Of requests about which nothing is known but that no filter and no penalty is looked at.
UNFILTERED = SamplingBatchInfo(all_greedy=False, needs_filter=False, changes_logits=False)
