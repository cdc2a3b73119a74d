"""How much of the time prefill may take from requests that decode."""

from __future__ import annotations

# Of a request that decodes while prompts arrive; what a pass costs the steps around it comes on top.
SLOWDOWN = 1.2


class PrefillShare:
    """A prefill pass makes a debt, which decoding pays back: after a pass of t seconds requests decode for
    t / (SLOWDOWN - 1) seconds before the next. So no pass waits where nobody decodes, a pass stops decoding
    for no longer than one chunk takes, and in the long run decoding keeps 1 / SLOWDOWN of its speed."""

    def __init__(self, limited: bool) -> None:
        self.limited = limited
        self.debt = 0.0  # seconds of decoding that the last passes still owe

    def allows(self, decoding: bool) -> bool:
        """Whether the next pass may run, where requests are `decoding` or not."""
        return not (self.limited and decoding) or self.debt <= 0

    def add_prefill(self, seconds: float, decoding: bool) -> None:
        self.debt = self.debt + seconds / (SLOWDOWN - 1) if decoding else 0.0

    def add_decode(self, seconds: float) -> None:
        self.debt = max(0.0, self.debt - seconds)
