"""How much prefill may slow down requests that decode."""

from __future__ import annotations

SHARE = 0.25  # seconds of prefill that a second of decoding allows
LONGEST_WAIT = 0.5  # seconds of passes behind each other, whatever is allowed: then comes a decode step
MOST_OVERDRAWN = 2.0  # seconds: a pass that compiles kernels may take longer


class PrefillBudget:
    """A token bucket of seconds, by the clock of those who decode: all time counts, from the moment at which
    a decode step is read to that at which the next one is.

    A step without a pass before it shows what decoding takes, and puts in SHARE of that. A step behind passes
    takes out all its time but what the last step without took, which is forgotten then: no measure
    outlives the next pass, whatever has become of the batch. A pass may run unless the bucket is overdrawn,
    or the passes since the last step have taken LONGEST_WAIT.

    So whatever arrives, decoding takes no longer than 1 + SHARE times what it takes alone, `burst` seconds
    and the pass that overdraws, with what still ran when it began. Prompts that come together are computed
    at once, as far as the burst reaches; later ones wait for their share, and for nothing else: of a debt no
    more than MOST_OVERDRAWN is kept.
    """

    def __init__(self, burst: float) -> None:
        """`burst`: seconds that the bucket holds, and holds at first; infinity: no limit."""
        self.burst = burst
        self.refill(0.0)

    def refill(self, now: float) -> None:
        """Nobody has decoded until now, so nobody has waited. `now` of all methods: seconds of one clock."""
        self.seconds = self.burst
        self._now = now
        self._passed = True  # since a step was read: the end of a pass may show in the step after it alone
        self._waited = 0.0  # seconds since then, in passes
        self._step = 0.0  # seconds that decoding is known to take

    @property
    def allows_pass(self) -> bool:
        """Whether the next prefill pass may run while requests decode."""
        return self.seconds >= 0 and self._waited < LONGEST_WAIT

    def end_pass(self, now: float) -> None:
        """A pass has run while requests waited for their next step."""
        elapsed, self._now = now - self._now, now
        self._passed = True
        self._waited += elapsed
        self._add(-elapsed)

    def read_step(self, now: float) -> None:
        """A decode step was read; it was launched after all passes before it."""
        elapsed, self._now = now - self._now, now
        self._waited = 0.0
        if self._passed:
            self._add(self._step - elapsed)
            self._passed, self._step = False, 0.0
        else:
            self._add(SHARE * elapsed)
            self._step = elapsed

    def _add(self, seconds: float) -> None:
        self.seconds = max(-MOST_OVERDRAWN, min(self.seconds + seconds, self.burst))
