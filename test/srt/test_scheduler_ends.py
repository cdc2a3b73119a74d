"""How requests end: lengths, stops, refusals, errors and aborts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from history_worker import HistoryWorker
from scheduler_harness import Harness, greedy, prompt_of
from sglang.srt.managers.detokenizer import OutputText
from sglang.srt.managers.io_struct import (
    AbortReq,
)
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.stop_checker import StopChecker
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.tokenizer import load_tokenizer


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


SPECIAL_STOPS = [  # (tokens, stop, special tokens hidden) -> tokens until the stop, text
    ("a<s>b", "ab", True, 3, ""),
    ("a<s>b", "ab", False, None, "a<s>b"),
    ("a<s>b", "<s>", True, 2, "a"),
    ("a<s>b", "<s>", False, 2, "a"),
    ("a<s>b", "a<s>", True, None, "ab"),
    ("a<s>b", "a<s>", False, 2, ""),
    ("xab", "b", True, 3, "xa"),
]


@pytest.mark.parametrize(("text", "stop", "hidden", "count", "shown"), SPECIAL_STOPS)
def test_stops_are_judged_in_the_text_that_the_client_gets(
    dummy_model: Path, text: str, stop: str, hidden: bool, count: int | None, shown: str
) -> None:
    """Bug: the scheduler looked at special tokens that the detokenizer hid, so one stopped where the other
    did not cut, or cut where the other went on."""
    tokenizer = load_tokenizer(str(dummy_model))
    special = tokenizer.all_special_ids[0]
    text, stop = (one.replace("<s>", tokenizer.all_special_tokens[0]) for one in (text, stop))
    shown = shown.replace("<s>", tokenizer.all_special_tokens[0])
    params = SamplingParams(stop=(stop,), skip_special_tokens=hidden)
    checker, output = StopChecker(frozenset(), 1000, tokenizer), OutputText(tokenizer, params)
    req, given, ended_at = Req("r", [1], params, seed=0), "", None
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert special in ids or "<" not in text
    for i, token in enumerate(ids):
        req.output_ids.append(token)
        reason = checker.check(req)
        last = i == len(ids) - 1
        given += output.feed([token], reason or ({"type": "length"} if last else None))
        if reason is not None:
            ended_at = len(req.output_ids)
            break
    assert (ended_at, given) == (count, shown)


# Errors


BAD_REQUESTS: list[tuple[str, list[int], dict[str, Any], str]] = [
    ("empty prompt", [], {}, "the prompt is empty"),
    ("unknown token", [1, 97], {}, "input_ids must be in [0, 97), got 97"),
    ("negative token", [-1], {}, "input_ids must be in [0, 97), got -1"),
    ("fewer tokens than none", [1], {"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
    ("nan", [1], {"temperature": float("nan")}, "temperature must be in"),
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

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

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


def test_an_error_while_a_request_is_admitted_ends_it_alone() -> None:
    """Bug: a temperature beyond float32 raised where the request's row is written, and the server exited."""
    harness = Harness(HistoryWorker(lookahead=3))
    write = harness.scheduler.memory._write_state

    def fail_for_hot(req: Req) -> None:
        if req.sampling_params.temperature == 7:
            raise OverflowError("value cannot be converted to type float without overflow")
        write(req)

    harness.scheduler.memory._write_state = fail_for_hot
    good, bad = harness.send(prompt_of(30, 2)), harness.send(prompt_of(30, 1), temperature=7.0)
    last = harness.send(prompt_of(30, 3))
    harness.finish()
    assert harness.results[bad].finish_reason["status_code"] == 500
    for rid, seed in ((good, 2), (last, 3)):
        assert harness.results[rid].output_ids == greedy(prompt_of(30, seed), 8)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63, 2**64 - 1])
def test_seeds_of_64_bits(seed: int) -> None:
    """Bug: negative ones, and those of 2**63 and above, were refused."""
    results = [Harness().run(prompt_of(5), temperature=1.0, seed=one) for one in (seed, seed, seed ^ 1)]
    assert [result.finish_reason["type"] for result in results] == ["length"] * 3
    first, again, other = (result.output_ids for result in results)
    assert first == again != other


def test_an_engine_wide_error_is_not_swallowed() -> None:
    harness = Harness()
    harness.send(prompt_of(6))
    harness.worker.prefill = lambda chunks: 1 / 0
    with pytest.raises(ZeroDivisionError):
        harness.step()


def test_many_that_wait_are_aborted_at_once() -> None:
    """Bug: each was looked for among all that wait: a client that left 65,536 sequences stopped the others'
    decoding for half a minute."""
    harness = Harness(HistoryWorker(max_running_requests=1))
    harness.send(prompt_of(4), max_new_tokens=60)
    waiting = [harness.send([5]) for _ in range(20_000)]
    harness.step()
    harness.link.inbox.append(AbortReq(waiting[10_000:] + waiting[-1:]))
    start = time.process_time()
    harness.step()
    assert time.process_time() - start < 1.0
    assert [req.rid for req in harness.scheduler.queue.waiting] == waiting[:10_000]
    assert harness.results[waiting[-1]].finish_reason["type"] == "abort"


def test_aborts_wherever_a_request_is() -> None:
    harness = Harness(HistoryWorker(max_running_requests=2), chunked_prefill_size=8)
    running = harness.send(prompt_of(6, 1), max_new_tokens=50)
    harness.step(3)
    partial, waiting = harness.send(prompt_of(30, 2)), harness.send(prompt_of(30, 3))
    harness.step()
    assert harness.scheduler.queue.partial.rid == partial
    harness.link.inbox.append(AbortReq([running, partial, waiting, "unknown"]))
    harness.step()
    assert harness.scheduler.is_idle
    harness.finish()
    assert {harness.results[rid].finish_reason["type"] for rid in (running, partial, waiting)} == {"abort"}
    assert (
        harness.results[running].output_ids
        == greedy(prompt_of(6, 1), 50)[: len(harness.results[running].output_ids)]
    )
    harness.link.inbox.append(AbortReq([running]))  # finished long ago
    assert harness.run(prompt_of(6)).output_ids == greedy(prompt_of(6), 8)
