"""The scheduler over `HistoryWorker`: every request gets its own tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from history_worker import HistoryWorker, Sampling, continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_harness import Harness, greedy, prompt_of
from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.managers.io_struct import (
    AbortReq,
)
from sglang.srt.sampling.sampling_params import SamplingParams


@dataclass(frozen=True)
class Case:
    name: str
    lookahead: int = 1
    num_pages: int = 200
    max_running_requests: int = 8
    chunked_prefill_size: int = -1
    disable_radix_cache: bool = False
    retracts: bool = False
    overlaps: bool = False


CASES = [
    Case("plain"),
    Case("speculative", lookahead=4),
    Case("one at a time", max_running_requests=1),
    Case("chunked", chunked_prefill_size=7),
    Case("chunks of one token", chunked_prefill_size=1, lookahead=3),
    Case("no prefix cache", disable_radix_cache=True, lookahead=4),
    Case("little memory", num_pages=26, retracts=True),
    Case("little memory, speculative", num_pages=28, lookahead=4, retracts=True),
    Case("little memory, chunked", num_pages=28, chunked_prefill_size=5, lookahead=2, retracts=True),
    Case("little memory, no prefix cache", num_pages=26, disable_radix_cache=True, retracts=True),
    Case("overlap", overlaps=True),
    Case("overlap, speculative", lookahead=4, overlaps=True),
    Case("overlap, chunked", lookahead=3, chunked_prefill_size=5, overlaps=True),
    Case("overlap, little memory", num_pages=28, lookahead=4, retracts=True, overlaps=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_request_gets_its_own_tokens(case: Case) -> None:
    worker = HistoryWorker(
        num_pages=case.num_pages,
        lookahead=case.lookahead,
        max_running_requests=case.max_running_requests,
        overlaps=case.overlaps,
    )
    harness = Harness(worker, case.chunked_prefill_size, case.disable_radix_cache)
    rng = random.Random(7)
    stem = prompt_of(40)
    expected: dict[str, list[int]] = {}
    for i in range(40):
        prompt = stem[: rng.randint(0, 40)] + rng.choices(range(97), k=rng.randint(1, 12))
        params = {"temperature": 0.0} if i % 2 else {"temperature": 0.7, "top_k": 3, "min_p": 0.25, "seed": i}
        count = rng.randint(1, 40)
        rid = harness.send(prompt, max_new_tokens=count, stream=bool(i % 3), **params)
        expected[rid] = continuation(prompt, Sampling.of(SamplingParams(**params), i), count, 97)
        harness.step(rng.randint(0, 3))
    harness.finish()
    for rid, tokens in expected.items():
        assert harness.results[rid].output_ids == tokens
        assert harness.results[rid].finish_reason == {"type": "length", "length": len(tokens)}
        assert harness.results[rid].last.completion_tokens == len(tokens)
    assert worker.largest_batch == min(worker.largest_batch, case.max_running_requests)
    assert (harness.scheduler.num_retractions > 0) == case.retracts
    assert worker.largest_in_flight == 1 + case.overlaps
    hits = harness.scheduler.internal_state()["cache_hit_rate"]
    assert hits == 0 if case.disable_radix_cache else hits > 0.2


@dataclass(frozen=True)
class Arrival:
    prompt_length: int
    stem: int
    max_new_tokens: int
    steps_before: int
    abort_after: int | None


ARRIVALS = st.builds(
    Arrival,
    prompt_length=st.integers(1, 30),
    stem=st.integers(0, 2),
    max_new_tokens=st.integers(1, 20),
    steps_before=st.integers(0, 4),
    abort_after=st.one_of(st.none(), st.integers(0, 12)),
)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=12),
    lookahead=st.integers(1, 4),
    num_pages=st.integers(14, 30),
    chunk=st.sampled_from([-1, 3, 16]),
    page_size=st.sampled_from([1, 4]),
    overlaps=st.booleans(),
)
def test_arrivals_and_aborts_in_any_order(
    arrivals: list[Arrival], lookahead: int, num_pages: int, chunk: int, page_size: int, overlaps: bool
) -> None:
    pages = num_pages * 4 // page_size
    worker = HistoryWorker(pages, page_size, lookahead, 4, context_len=60, overlaps=overlaps)
    harness = Harness(worker, chunk)
    for arrival in arrivals:
        harness.step(arrival.steps_before)
        prompt = prompt_of(30, arrival.stem)[: arrival.prompt_length]
        rid = harness.send(prompt, max_new_tokens=arrival.max_new_tokens, stream=True)
        if arrival.abort_after is not None:
            harness.step(arrival.abort_after)
            harness.link.inbox.append(AbortReq([rid]))
    harness.finish()
    for arrival, result in zip(arrivals, harness.results.values()):
        expected = greedy(prompt_of(30, arrival.stem)[: arrival.prompt_length], arrival.max_new_tokens)
        if result.finish_reason["type"] == "abort":
            assert arrival.abort_after is not None
            assert result.output_ids == expected[: len(result.output_ids)]
        else:
            assert result.output_ids == expected


@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize("overlaps", [False, True])
def test_requests_end_at_a_stop_and_at_the_end_of_the_context(lookahead: int, overlaps: bool) -> None:
    """The step that is under way when a stop is read runs past it, at the context's end past the table."""
    prompt = prompt_of(9)
    worker = HistoryWorker(lookahead=lookahead, context_len=60, overlaps=overlaps)
    harness = Harness(worker)
    stop = greedy(prompt, 20)[13]
    end = greedy(prompt, 20).index(stop)
    result = harness.run(prompt, max_new_tokens=100, stop_token_ids=(stop,))
    assert result.output_ids == greedy(prompt, end + 1)
    assert result.finish_reason == {"type": "stop", "matched": stop}
    again = harness.run(prompt, max_new_tokens=200, ignore_eos=True)
    assert again.output_ids == greedy(prompt, 51)
    assert again.finish_reason == {"type": "length", "length": 51}


def test_overlap_waits_for_logprobs() -> None:
    """They are read from logits that the next step overwrites."""
    worker = HistoryWorker(lookahead=3, overlaps=True)
    harness = Harness(worker)
    result = harness.run(prompt_of(11), return_logprob=True, max_new_tokens=20)
    assert [entry.token_id for entry in result.output_logprobs] == result.output_ids
    assert worker.largest_in_flight == 1


def test_seeds_are_drawn_from_the_servers_seed() -> None:
    first, second = (
        [harness.run([1, 2, 3], temperature=1.0).output_ids for _ in range(2)]
        for harness in (Harness(), Harness())
    )
    assert first == second
    assert first[0] != first[1]


def test_outputs_come_one_by_one_only_for_streams() -> None:
    harness = Harness()
    assert harness.run(prompt_of(5), stream=True, max_new_tokens=10).messages == 10
    assert harness.run(prompt_of(5), stream=False, max_new_tokens=10).messages == 2  # the first, and the end


@pytest.mark.parametrize("chunk", [-1, 3])
@pytest.mark.parametrize("start", [-1, 0, 4])
def test_logprobs_belong_to_their_tokens(chunk: int, start: int) -> None:
    harness = Harness(HistoryWorker(lookahead=3), chunk)
    prompt = prompt_of(11)
    for _ in range(2):  # the second time, the prompt is in the cache
        result = harness.run(prompt, return_logprob=True, logprob_start_len=start, top_logprobs_num=1)
        assert [entry.token_id for entry in result.output_logprobs] == result.output_ids
        assert {len(entry.top) for entry in result.output_logprobs} == {1}
        if start < 0:
            assert result.input_logprobs is None
        else:
            assert [entry.token_id for entry in result.input_logprobs] == prompt[start:]
    assert (result.last.cached_tokens > 0) == (start < 0)


class WorkClock:
    """Stands for the module `time`: only the scheduler's messages and the worker's steps take time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            self.now += seconds
            return call(*args, **options)

        return timed


def test_throughput_does_not_count_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: seconds in which nothing was asked for lowered the tokens per second of those that followed."""
    clock, harness = WorkClock(), Harness()
    monkeypatch.setattr(scheduler_module, "time", clock)
    worker, link = harness.worker, harness.link
    worker.prefill, worker.decode = clock.takes(0.25, worker.prefill), clock.takes(0.25, worker.decode)
    link.receive = clock.takes(1000.0, link.receive)  # the scheduler waits for each message
    for seed in range(4):
        harness.run(prompt_of(6, seed), max_new_tokens=8)
    state = harness.scheduler.internal_state()
    assert state["gen_throughput"] == state["last_gen_throughput"] == 1 / 0.25
