"""The scheduler over `HistoryWorker`: every request gets its own tokens, and every page comes back."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from history_worker import HistoryWorker, Sampling, continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchOutput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    ReqOutput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler import Scheduler, load_tokenizer
from sglang.srt.managers.scheduler_link import LocalLink
from sglang.srt.managers.stop_checker import StopChecker
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

MAX_STEPS = 5000


@dataclass
class Result:
    """All that a request's outputs said, put together."""

    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[Any] = field(default_factory=list)
    input_logprobs: list[Any] | None = None
    messages: int = 0
    last: ReqOutput | None = None

    @property
    def finish_reason(self) -> dict[str, Any] | None:
        return self.last and self.last.finish_reason


class Harness:
    """A scheduler in process, and what it has answered."""

    def __init__(
        self,
        worker: HistoryWorker | None = None,
        chunked_prefill_size: int = -1,
        disable_radix_cache: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.worker = worker or HistoryWorker()
        self.link = LocalLink()
        args = ServerArgs(
            model_path="none",
            device="cpu",
            chunked_prefill_size=chunked_prefill_size,
            disable_radix_cache=disable_radix_cache,
        )
        self.scheduler = Scheduler(args, self.worker, self.link, tokenizer)
        self.results: dict[str, Result] = {}
        self.answers: list[Any] = []

    def send(self, prompt: list[int], rid: str | None = None, **options: Any) -> str:
        rid = rid or f"r{len(self.results)}"
        names = ("stream", "return_logprob", "logprob_start_len", "top_logprobs_num")
        own = {name: options.pop(name) for name in names if name in options}
        params = SamplingParams(**({"temperature": 0, "max_new_tokens": 8} | options))
        self.results[rid] = Result()
        self.link.inbox.append(
            TokenizedGenerateReqInput(rid=rid, input_ids=prompt, sampling_params=params, **own)
        )
        return rid

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.step()
            while self.link.outbox:
                message = self.link.outbox.popleft()
                if isinstance(message, BatchOutput):
                    for output in message.outputs:
                        self.collect(output)
                else:
                    self.answers.append(message)

    def collect(self, output: ReqOutput) -> None:
        result = self.results[output.rid]
        assert result.finish_reason is None, f"{output.rid} goes on after its end"
        result.messages += 1
        result.output_ids += output.output_ids
        result.output_logprobs += output.output_logprobs or []
        if output.input_logprobs is not None:
            assert result.input_logprobs is None, "prompt logprobs are sent once"
            result.input_logprobs = output.input_logprobs
        result.last = output

    def finish(self) -> None:
        """Runs until nothing is left to do."""
        for _ in range(MAX_STEPS):
            self.step()
            if self.scheduler.is_idle and not self.link.inbox:
                break
        else:
            raise AssertionError(f"not finished after {MAX_STEPS} steps")
        assert self.scheduler.check_memory() is None
        assert self.scheduler.leak is None
        for result in self.results.values():
            assert result.finish_reason is not None

    def run(self, prompt: list[int], **options: Any) -> Result:
        rid = self.send(prompt, **options)
        self.finish()
        return self.results[rid]


def greedy(prompt: list[int], count: int) -> list[int]:
    return continuation(prompt, Sampling.of(SamplingParams(temperature=0), 0), count, 97)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97), k=length)


# Tokens


@dataclass(frozen=True)
class Case:
    name: str
    lookahead: int = 1
    num_pages: int = 200
    max_running_requests: int = 8
    chunked_prefill_size: int = -1
    disable_radix_cache: bool = False
    retracts: bool = False


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
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_request_gets_its_own_tokens(case: Case) -> None:
    worker = HistoryWorker(
        num_pages=case.num_pages, lookahead=case.lookahead, max_running_requests=case.max_running_requests
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
)
def test_arrivals_and_aborts_in_any_order(
    arrivals: list[Arrival], lookahead: int, num_pages: int, chunk: int, page_size: int
) -> None:
    worker = HistoryWorker(num_pages * 4 // page_size, page_size, lookahead, 4, context_len=60)
    harness = Harness(worker, chunk)
    for arrival in arrivals:
        harness.step(arrival.steps_before)
        prompt = prompt_of(30, arrival.stem)[: arrival.prompt_length]
        rid = harness.send(prompt, max_new_tokens=arrival.max_new_tokens, stream=True)
        if arrival.abort_after is not None:
            harness.step(arrival.abort_after)
            harness.link.inbox.append(AbortReq(rid))
    harness.finish()
    for arrival, result in zip(arrivals, harness.results.values()):
        expected = greedy(prompt_of(30, arrival.stem)[: arrival.prompt_length], arrival.max_new_tokens)
        if result.finish_reason["type"] == "abort":
            assert arrival.abort_after is not None
            assert result.output_ids == expected[: len(result.output_ids)]
        else:
            assert result.output_ids == expected


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


# Prefix cache


@pytest.mark.parametrize(("lookahead", "expected"), [(1, 16), (4, 16)])
def test_a_prompt_is_found_again(lookahead: int, expected: int) -> None:
    harness = Harness(HistoryWorker(lookahead=lookahead))
    prompt = prompt_of(19)
    assert harness.run(prompt).last.cached_tokens == 0
    computed = harness.worker.prefilled_tokens
    again = harness.run(prompt)
    assert again.last.cached_tokens == expected
    assert harness.worker.prefilled_tokens - computed == len(prompt) - expected
    assert again.output_ids == greedy(prompt, 8)


def test_one_token_is_always_computed() -> None:
    harness = Harness()
    prompt = prompt_of(16)
    harness.run(prompt)
    assert harness.run(prompt).last.cached_tokens == 12


def test_output_is_found_again_as_prompt() -> None:
    harness = Harness(HistoryWorker(lookahead=3))
    prompt = prompt_of(9)
    conversation = prompt + harness.run(prompt, max_new_tokens=20).output_ids
    assert harness.run([*conversation, 5]).last.cached_tokens == 28


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    harness = Harness()
    prompt = prompt_of(17)
    rids = [harness.send(prompt, seed=i, temperature=1) for i in range(4)]
    harness.finish()
    assert [harness.results[rid].last.cached_tokens for rid in rids] == [0, 16, 16, 16]
    assert harness.worker.prefilled_tokens == 17 + 3


def test_a_prompt_is_shared_chunk_by_chunk() -> None:
    harness = Harness(HistoryWorker(lookahead=2), chunked_prefill_size=8)
    prompt = prompt_of(40)
    first = harness.send(prompt)
    harness.step(2)
    second = harness.send([*prompt[:24], 1, 2, 3])
    harness.finish()
    assert harness.results[second].last.cached_tokens >= 20
    assert harness.results[first].output_ids == greedy(prompt, 8)


def test_flush_needs_an_idle_scheduler() -> None:
    harness = Harness()
    harness.run(prompt_of(20))
    harness.send(prompt_of(20))
    harness.step()
    harness.link.inbox.append(FlushCacheReqInput("busy"))
    harness.finish()
    harness.link.inbox.append(FlushCacheReqInput("idle"))
    harness.step()
    assert harness.answers == [
        FlushCacheReqOutput("busy", False, "1 requests are not finished"),
        FlushCacheReqOutput("idle", True, ""),
    ]
    state = harness.scheduler.internal_state()
    assert (state["available_pages"], state["evictable_pages"]) == (64, 0)
    assert harness.run(prompt_of(20)).last.cached_tokens == 0


# Memory


def test_the_youngest_is_retracted_and_comes_back_first() -> None:
    harness = Harness(HistoryWorker(num_pages=12, max_running_requests=2))
    old = harness.send(prompt_of(12, 1), max_new_tokens=30)
    young = harness.send(prompt_of(12, 2), max_new_tokens=30)
    late = harness.send(prompt_of(2), max_new_tokens=2)
    while not harness.scheduler.num_retractions:
        harness.step()
        assert late in [req.rid for req in harness.scheduler.waiting]
    assert [req.rid for req in harness.scheduler.running] == [old]
    assert [req.rid for req in harness.scheduler.waiting] == [young, late]
    harness.finish()
    assert harness.results[young].output_ids == greedy(prompt_of(12, 2), 30)


def test_no_request_is_admitted_onto_the_last_page_of_those_that_run() -> None:
    harness = Harness(HistoryWorker(num_pages=7))
    harness.send(prompt_of(14, 1), max_new_tokens=6)  # 4 pages at first, 5 in the end
    second = harness.send(prompt_of(10, 2))  # 3 pages
    harness.step(2)
    assert [req.rid for req in harness.scheduler.waiting] == [second]
    harness.finish()
    assert harness.scheduler.num_retractions == 0


def test_a_request_may_fill_the_whole_cache() -> None:
    harness = Harness(HistoryWorker(num_pages=10, lookahead=4))
    for i in range(3):
        prompt = prompt_of(17, i)
        assert harness.run(prompt, max_new_tokens=20).output_ids == greedy(prompt, 20)  # 17 + 20 - 1 + 4 = 40
    assert harness.scheduler.num_retractions == 0


@pytest.mark.parametrize("lookahead", [1, 5])
def test_generation_ends_at_the_context_length(lookahead: int) -> None:
    harness = Harness(HistoryWorker(context_len=22, lookahead=lookahead))
    result = harness.run(prompt_of(15), max_new_tokens=100)
    assert result.output_ids == greedy(prompt_of(15), 7)
    assert result.finish_reason == {"type": "length", "length": 7}
    assert harness.run(prompt_of(21), max_new_tokens=100).output_ids == greedy(prompt_of(21), 1)


def break_lost_page(scheduler: Scheduler) -> str:
    page = scheduler.memory.allocator.alloc(1)[0]
    return f"pages lost: [{page}]"


def break_double_page(scheduler: Scheduler) -> str:
    page = next(scheduler.memory.cache.nodes()).page
    scheduler.memory.allocator.free([page])
    return f"pages held twice: [{page}]"


def break_lock(scheduler: Scheduler) -> str:
    node = next(iter(scheduler.memory.cache.root.children.values()))
    scheduler.memory.cache.lock(node)
    return f"cached pages still locked: [{node.page}]"


def break_slot(scheduler: Scheduler) -> str:
    scheduler.memory.pool.alloc()
    return "free request slots: "


@pytest.mark.parametrize("damage", [break_lost_page, break_double_page, break_lock, break_slot])
def test_what_is_not_accounted_for_is_reported(damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness()
    harness.run(prompt_of(9))
    expected = damage(harness.scheduler)
    assert expected in harness.scheduler.check_memory()
    harness.send([96, 95])
    harness.step(10)
    assert expected in harness.scheduler.leak
    assert expected in caplog.text
    harness.link.inbox.append(GetInternalStateReq("state"))
    harness.step()
    (answer,) = harness.answers
    assert isinstance(answer, GetInternalStateReqOutput)
    assert expected in answer.internal_state["leak"]


# Ends


def token_at(i: int) -> int:
    return greedy(prompt_of(6), 20)[i]


@pytest.mark.parametrize("lookahead", [1, 4])
def test_ends(lookahead: int) -> None:
    tokens = greedy(prompt_of(6), 20)
    assert tokens.index(tokens[5]) == 5
    eos = HistoryWorker(lookahead=lookahead, eos_token_ids=frozenset({tokens[5]}))
    cases: list[tuple[dict[str, Any], int, dict[str, Any]]] = [
        ({}, 6, {"type": "stop", "matched": tokens[5]}),
        ({"ignore_eos": True}, 20, {"type": "length", "length": 20}),
        ({"stop_token_ids": (tokens[2],)}, 3, {"type": "stop", "matched": tokens[2]}),
        ({"stop_token_ids": (tokens[5],), "ignore_eos": True}, 6, {"type": "stop", "matched": tokens[5]}),
        ({"max_new_tokens": 3}, 3, {"type": "length", "length": 3}),
        ({"max_new_tokens": 6}, 6, {"type": "stop", "matched": tokens[5]}),
        ({"max_new_tokens": 1}, 1, {"type": "length", "length": 1}),
    ]
    harness = Harness(eos)
    for options, count, reason in cases:
        result = harness.run(prompt_of(6), **({"max_new_tokens": 20} | options))
        assert (result.output_ids, result.finish_reason) == (tokens[:count], reason), options


@pytest.mark.parametrize("lookahead", [1, 4])
def test_stop_strings_end_at_the_token_that_completes_them(dummy_model: Path, lookahead: int) -> None:
    tokenizer = load_tokenizer(str(dummy_model))
    harness = Harness(HistoryWorker(lookahead=lookahead), tokenizer=tokenizer)
    tokens = greedy(prompt_of(6), 20)
    stop = tokenizer.decode(tokens[9:12])
    result = harness.run(prompt_of(6), max_new_tokens=20, stop=("never", stop))
    assert result.finish_reason == {"type": "stop", "matched": stop}
    assert result.output_ids == tokens[:12]


@settings(max_examples=100, deadline=None)
@given(text=st.text("aé☃😀", min_size=1, max_size=12), stop=st.text("aé☃😀", min_size=1, max_size=4))
def test_stop_strings_are_found_where_the_whole_text_has_them(
    dummy_model: Path, text: str, stop: str
) -> None:
    tokenizer = load_tokenizer(str(dummy_model))
    checker = StopChecker(frozenset(), 1000, tokenizer)
    req = Req("r", [1], SamplingParams(stop=(stop,)), seed=0)
    ended_at = None
    for token in tokenizer.encode(text):
        req.output_ids.append(token)
        if checker.check(req) is not None:
            ended_at = len(req.output_ids)
            break
    at = text.find(stop)
    assert ended_at == (None if at < 0 else len((text[:at] + stop).encode()))


# Errors


BAD_REQUESTS: list[tuple[str, list[int], dict[str, Any], str]] = [
    ("empty prompt", [], {}, "the prompt is empty"),
    ("unknown token", [1, 97], {}, "input_ids must be in [0, 97), got 97"),
    ("negative token", [-1], {}, "input_ids must be in [0, 97), got -1"),
    ("no tokens wanted", [1], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ("nan", [1], {"temperature": float("nan")}, "temperature must be finite"),
    ("stop without tokenizer", [1], {"stop": ("x",)}, "stop ['x'] needs a tokenizer"),
    ("top logprobs", [1], {"top_logprobs_num": 21}, "top_logprobs_num must be in [0, 20], got 21"),
    ("logprob start", [1], {"logprob_start_len": 1}, "logprob_start_len must be in [-1, 1), got 1"),
    ("longer than the context", [1] * 60, {}, "the prompt has 60 tokens; the maximum is 59"),
    ("never fits", [1] * 20, {"max_new_tokens": 30}, "do not fit into the cache of 48 tokens"),
]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [case[1:] for case in BAD_REQUESTS],
    ids=[case[0] for case in BAD_REQUESTS],
)
def test_bad_requests_are_refused(prompt: list[int], options: dict[str, Any], message: str) -> None:
    num_pages = 12 if "cache" in message else 64
    harness = Harness(HistoryWorker(num_pages=num_pages, context_len=60))
    good = harness.send(prompt_of(10))
    bad = harness.send(prompt, **options)
    harness.finish()
    reason = harness.results[bad].finish_reason
    assert (reason["type"], reason["status_code"]) == ("abort", 400)
    assert message in reason["message"]
    assert harness.results[good].output_ids == greedy(prompt_of(10), 8)


class PoisonousTokenizer:
    """Fails on one token."""

    def __init__(self, poison: int) -> None:
        self.poison = poison

    def decode(self, tokens: list[int], **options: Any) -> str:
        if self.poison in tokens:
            raise RuntimeError("cannot decode this")
        return " ".join(map(str, tokens))


def test_a_poisonous_request_ends_alone() -> None:
    poison = greedy(prompt_of(6, 1), 5)[4]
    harness = Harness(HistoryWorker(lookahead=3), tokenizer=PoisonousTokenizer(poison))
    good, bad = harness.send(prompt_of(6, 2)), harness.send(prompt_of(6, 1), stop=("x",))
    harness.finish()
    assert harness.results[bad].finish_reason == {
        "type": "abort",
        "message": "internal error: cannot decode this",
        "status_code": 500,
    }
    assert harness.results[good].output_ids == greedy(prompt_of(6, 2), 8)
    assert harness.run(prompt_of(6, 3)).output_ids == greedy(prompt_of(6, 3), 8)


def test_an_engine_wide_error_is_not_swallowed() -> None:
    harness = Harness()
    harness.send(prompt_of(6))
    harness.worker.prefill = lambda chunks: 1 / 0
    with pytest.raises(ZeroDivisionError):
        harness.step()


def test_aborts_wherever_a_request_is() -> None:
    harness = Harness(HistoryWorker(max_running_requests=2), chunked_prefill_size=8)
    running = harness.send(prompt_of(6, 1), max_new_tokens=50)
    harness.step(3)
    partial, waiting = harness.send(prompt_of(30, 2)), harness.send(prompt_of(30, 3))
    harness.step()
    assert harness.scheduler.partial.rid == partial
    for rid in (running, partial, waiting, "unknown"):
        harness.link.inbox.append(AbortReq(rid))
    harness.step()
    assert harness.scheduler.is_idle
    harness.finish()
    assert {harness.results[rid].finish_reason["type"] for rid in (running, partial, waiting)} == {"abort"}
    assert (
        harness.results[running].output_ids
        == greedy(prompt_of(6, 1), 50)[: len(harness.results[running].output_ids)]
    )
    harness.link.inbox.append(AbortReq(running))  # finished long ago
    assert harness.run(prompt_of(6)).output_ids == greedy(prompt_of(6), 8)
