"""How much prefill may slow down requests that decode."""

from __future__ import annotations

SLOWDOWN = 1.25  # of decoding while prompts do not end
SMOOTHING = 0.1  # weight of the newest step in the usual time of a step
MOST_OVERDRAWN = 2.0  # seconds: a pass that compiles kernels may take longer


class PrefillBudget:
    """A token bucket of seconds: all time that passes is taken out, and each decode step that is read puts in
    SLOWDOWN times what a step usually takes. A prefill pass may run unless the bucket is overdrawn.

    So whatever arrives, n steps take no longer than SLOWDOWN * n usual ones, `burst` seconds and the pass
    that overdraws it. Prompts that come together are computed at once, as far as that reaches; later ones
    wait for their share.
    """

    def __init__(self, burst: float | None) -> None:
        """`burst`: seconds that the bucket holds, and holds at first; None: no limit."""
        self.burst = burst
        self.usual_step: float | None = None  # seconds, of steps that follow another step
        self._after_step = False
        self.refill()

    def refill(self) -> None:
        """Nobody decodes, so nobody waits."""
        self.seconds = self.burst or 0.0
        self._after_step = False

    @property
    def allows_pass(self) -> bool:
        """Whether the next prefill pass may run while requests decode."""
        return self.burst is None or self.seconds >= 0

    def account(self, seconds: float, steps: int, prefilled: bool) -> None:
        """What happened while requests decoded: `steps` decode steps (0 or 1) were read, beside a pass or
        not."""
        if self.burst is None:
            return
        alone = bool(steps) and not prefilled
        if alone and self._after_step:  # otherwise its time is not that of a step
            old = seconds if self.usual_step is None else self.usual_step
            self.usual_step = old + SMOOTHING * (seconds - old)
        self._after_step = alone
        usual = seconds if self.usual_step is None else self.usual_step
        left = self.seconds + SLOWDOWN * usual * steps - seconds
        self.seconds = max(-MOST_OVERDRAWN, min(left, self.burst))
