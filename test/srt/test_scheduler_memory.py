"""The scheduler's memory: prefixes are found again, requests are retracted, every page comes back."""

from __future__ import annotations

from typing import Any

import pytest
from history_worker import HistoryWorker
from scheduler_harness import Harness, greedy, prompt_of
from sglang.srt.managers.io_struct import (
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
)
from sglang.srt.managers.scheduler import Scheduler

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
        assert late in [req.rid for req in harness.scheduler.queue.waiting]
    assert [req.rid for req in harness.scheduler.running] == [old]
    assert [req.rid for req in harness.scheduler.queue.waiting] == [young, late]
    harness.finish()
    assert harness.results[young].output_ids == greedy(prompt_of(12, 2), 30)


def test_no_request_is_admitted_onto_the_last_page_of_those_that_run() -> None:
    harness = Harness(HistoryWorker(num_pages=7))
    harness.send(prompt_of(14, 1), max_new_tokens=6)  # 4 pages at first, 5 in the end
    second = harness.send(prompt_of(10, 2))  # 3 pages
    harness.step(2)
    assert [req.rid for req in harness.scheduler.queue.waiting] == [second]
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
