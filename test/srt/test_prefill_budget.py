"""Requests that decode keep their speed while prompts arrive, on the clock of a device that runs ahead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from history_worker import HistoryWorker, Launched
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scheduler_harness import Harness, greedy, prompt_of
from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.managers.prefill_budget import LONGEST_WAIT, MOST_OVERDRAWN, SHARE
from sglang.srt.managers.schedule_batch import PrefillChunk, Req, StepOutput

TOKENS = 101  # of the request that decodes: a first one and 100 steps


@dataclass(frozen=True)
class Pass:
    """Seconds of a prefill pass until its tokens are read, and what the device still does of it then."""

    seconds: float
    tail: float = 0.0

    @property
    def total(self) -> float:
        return self.seconds + self.tail


class TimedWorker(HistoryWorker):
    """Runs on a device that works in order, beside the host; stands for the module `time`, too. Only waiting
    for the device takes time."""

    def __init__(
        self, step: Callable[[int], float], next_pass: Callable[[int], Pass], overlaps: bool
    ) -> None:
        """What decode step i takes, and pass i."""
        super().__init__(num_pages=400, overlaps=overlaps)
        self.step, self.next_pass = step, next_pass
        self.now = self.device = 0.0  # of the host; when the device has done all that was launched
        self.steps: list[float] = []
        self.passes: list[tuple[float, Pass]] = []  # with when they began

    def perf_counter(self) -> float:
        return self.now

    def launch(self, seconds: float) -> float:
        self.device = max(self.device, self.now) + seconds
        return self.device

    def prefill(self, chunks: list[PrefillChunk]) -> StepOutput:
        taken = self.next_pass(len(self.passes))
        self.passes.append((self.now, taken))
        self.now = self.launch(taken.seconds)
        self.launch(taken.tail)
        return super().prefill(chunks)

    def launch_decode(self, reqs: list[Req]) -> TimedStep:
        self.steps.append(self.step(len(self.steps)))
        return TimedStep(super().launch_decode(reqs), self, self.launch(self.steps[-1]))


@dataclass(frozen=True)
class TimedStep:
    launched: Launched
    worker: TimedWorker
    done: float

    def read(self) -> StepOutput:
        self.worker.now = max(self.worker.now, self.done)
        return self.launched.read()


def decode_beside_prompts(
    worker: TimedWorker, monkeypatch: pytest.MonkeyPatch, prompts: Callable[[int], int], **args: Any
) -> float:
    """Seconds from the first token of a request to its last, where the queue is filled up to `prompts(i)`
    prompts before the scheduler's step i."""
    monkeypatch.setattr(scheduler_module, "time", worker)
    harness = Harness(worker, chunked_prefill_size=8, disable_radix_cache=True, **args)
    runner = harness.send(prompt_of(6), max_new_tokens=TOKENS, stream=True)
    harness.step()
    began, i = worker.now, 0
    while harness.results[runner].finish_reason is None:
        assert i < 5000, "the request does not get on"
        for _ in range(prompts(i) - len(harness.scheduler.queue.waiting)):
            harness.send(prompt_of(16, seed=len(harness.results)), max_new_tokens=1)
        harness.step()
        i += 1
    seconds = worker.now - began
    harness.finish()
    assert harness.results[runner].output_ids == greedy(prompt_of(6), TOKENS)
    return seconds


@dataclass(frozen=True)
class Arrivals:
    """Another prompt always waits."""

    per_token: float  # seconds, of the whole answer
    args: dict[str, Any] = field(default_factory=dict)
    step: Callable[[int], float] = lambda i: 0.1
    taken: Pass = Pass(0.5)


NO_BURST = {"prefill_burst": 0.0}
ARRIVALS = {
    "no burst": Arrivals(0.125, NO_BURST),
    "mixed chunk": Arrivals(0.125, {"enable_mixed_chunk": True}),
    "default": Arrivals(0.125 + 2.0 / 100),
    "a burst of three seconds": Arrivals(0.125 + 3.0 / 100, {"prefill_burst": 3.0}),
    "short passes": Arrivals(0.105, NO_BURST, taken=Pass(0.01)),
    # Regression: the step after a pass counted as decoding however long it took.
    "passes with a tail": Arrivals(0.125, NO_BURST, taken=Pass(0.5, tail=0.2)),
    # Regression: as long as a pass could follow every step, prompts had their share of what a step had taken
    # when the batch was large.
    "steps that become short": Arrivals(0.24, NO_BURST, step=lambda i: 1.0 if i < 10 else 0.1),
}


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("case", ARRIVALS.values(), ids=ARRIVALS)
def test_decoding_keeps_its_speed_while_prompts_arrive(
    monkeypatch: pytest.MonkeyPatch, case: Arrivals, overlaps: bool
) -> None:
    """Bug, by default: requests that decoded got no further while prompts kept arriving."""
    worker = TimedWorker(case.step, lambda i: case.taken, overlaps)
    per_token = decode_beside_prompts(worker, monkeypatch, lambda i: 2, **case.args) / (TOKENS - 1)
    # The last pass may be begun and not yet paid, and the first steps earn nothing.
    assert case.per_token - 0.02 < per_token < case.per_token + (case.taken.total + 0.3) / 100
    assert len(worker.passes) >= 5


STEPS = st.lists(st.floats(0.8, 1.25), min_size=1, max_size=30)  # each over the one before it
PASSES = st.lists(st.builds(Pass, st.floats(0.01, 1.0), st.floats(0.0, 0.3)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    ratios=STEPS,
    passes=PASSES,
    waiting=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    burst=st.sampled_from([0.0, 0.5, 2.0]),
    overlaps=st.booleans(),
)
@example([0.8], [Pass(0.01)], [2], 0.0, True)
@example([1.25, 0.8], [Pass(0.01, 0.4)], [2], 0.0, True)
def test_nothing_that_arrives_slows_decoding_beyond_its_share(
    ratios: list[float], passes: list[Pass], waiting: list[int], burst: float, overlaps: bool
) -> None:
    """All passes and steps that end within MOST_OVERDRAWN: however long, however often, whether their time
    shows when they are read or one step later. A step takes no less than four fifths of the one before."""
    steps = [0.1]
    for i in range(4 * TOKENS):
        steps.append(min(max(steps[-1] * ratios[i % len(ratios)], 0.001), 0.4))
    worker = TimedWorker(steps.__getitem__, lambda i: passes[i % len(passes)], overlaps)
    with pytest.MonkeyPatch.context() as monkeypatch:
        seconds = decode_beside_prompts(
            worker, monkeypatch, lambda i: waiting[i % len(waiting)], prefill_burst=burst
        )
    alone = sum(worker.steps[: TOKENS - 1]) + worker.passes[0][1].tail  # its own
    overdraws = max(taken.total for _, taken in worker.passes) + max(taken.tail for _, taken in worker.passes)
    assert overdraws + max(worker.steps) <= MOST_OVERDRAWN
    assert seconds <= (1 + SHARE) * alone + burst + overdraws + max(worker.steps) + 1e-6


@settings(max_examples=20, deadline=None)
@given(passes=PASSES, step=st.floats(0.01, 0.4), overlaps=st.booleans())
def test_prompts_get_their_share_of_the_time(passes: list[Pass], step: float, overlaps: bool) -> None:
    """Nobody starves: a pass that overdraws, and the one before it that still ran, are paid for by four times
    their time, and then the next one comes."""
    worker = TimedWorker(lambda i: step, lambda i: passes[i % len(passes)], overlaps)
    with pytest.MonkeyPatch.context() as monkeypatch:
        seconds = decode_beside_prompts(worker, monkeypatch, lambda i: 2, prefill_burst=0.0)
    debt = 2 * max(taken.total for taken in passes) + step
    began = [at for at, _ in worker.passes if at < seconds]
    assert all(b - a <= debt * (1 + 1 / SHARE) + 2 * step for a, b in pairwise(began))


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("burst", [30.0, -1.0])
def test_decoding_never_stands_still(monkeypatch: pytest.MonkeyPatch, burst: float, overlaps: bool) -> None:
    """Bug: as long as the burst lasted, and for ever without a limit, no token came while prompts waited."""
    worker = TimedWorker(lambda i: 0.1, lambda i: Pass(0.2), overlaps)
    decode_beside_prompts(worker, monkeypatch, lambda i: 2, prefill_burst=burst)
    others = [at for at, _ in worker.passes[1:]]
    follow_each_other = [later - at == pytest.approx(0.2) for at, later in pairwise(others)]
    assert "".join("x" if x else " " for x in follow_each_other).split(" ")[:20] == ["xx"] * 20
    assert 0.2 * 3 >= LONGEST_WAIT > 0.2 * 2


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_pass_that_takes_forever_is_forgiven(monkeypatch: pytest.MonkeyPatch, overlaps: bool) -> None:
    """Bug: prompts waited for four times as long as kernels had been compiled for."""
    worker = TimedWorker(lambda i: 0.1, lambda i: Pass(60.0), overlaps)
    decode_beside_prompts(worker, monkeypatch, lambda i: int(i < 90))
    second, third = (at for at, _ in worker.passes[1:3])
    steps = math.ceil(MOST_OVERDRAWN / (SHARE * 0.1))
    assert 60 + (steps - 1) * 0.1 < third - second < 60 + (steps + 4) * 0.1
