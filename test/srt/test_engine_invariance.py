"""What may not change the tokens: speculation, the metadata path, batching, the cache, chunks, retraction."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

NEW_TOKENS = 20
SPECULATIVE = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 4}


def prompts() -> list[list[int]]:
    """Lengths around the page size and the indexer's top-k (32); some share more than two pages."""
    rng = random.Random(3)
    stem = rng.choices(range(256), k=150)
    own = [rng.choices(range(256), k=length) for length in (1, 31, 63, 64, 65, 230)]
    return [*own, stem, stem[:140] + own[1], stem + own[2]]


def sampling_params() -> list[dict[str, Any]]:
    """In turn greedy, sampled, and sampled from a part of the vocabulary; seeded."""
    kinds = (
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    )
    common = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return [{**common, **kinds[i % len(kinds)], "seed": 100 + i} for i in range(len(prompts()))]


@dataclass(frozen=True)
class Case:
    name: str
    args: dict[str, Any] = field(default_factory=dict)
    precompute: bool = False
    alone: bool = False
    rounds: int = 1  # in the second, the prompts are in the cache
    retracts: bool = False


LITTLE_MEMORY = {"page_size": 4, "max_total_tokens": 4 * 100}

CASES = [
    Case("alone again", alone=True),
    Case("in a batch", rounds=2),
    Case("in a batch larger than the captured ones", {"cuda_graph_max_bs": 2}),
    Case("eager", {"disable_cuda_graph": True}),
    Case("no prefix cache", {"disable_radix_cache": True}, rounds=2),
    Case("chunked", {"chunked_prefill_size": 37}, rounds=2),
    Case("small pages", {"page_size": 16, "chunked_prefill_size": 50}, rounds=2),
    Case("retracted", LITTLE_MEMORY, rounds=2, retracts=True),
    Case("speculative, alone", SPECULATIVE, alone=True),
    Case("speculative, flag 0", SPECULATIVE, rounds=2),
    Case("speculative, flag 1", SPECULATIVE, precompute=True, rounds=2),
    Case("speculative, one step", SPECULATIVE | {"speculative_num_steps": 1}, precompute=True),
    Case("speculative, committed", SPECULATIVE | {"nsa_draft_seqlens": "committed"}, precompute=True),
    Case("speculative, shared", SPECULATIVE | {"nsa_metadata_layout": "shared"}, precompute=True),
    Case("speculative, in graph", SPECULATIVE | {"nsa_metadata_layout": "in_graph"}, precompute=True),
    Case("speculative, indirect", SPECULATIVE | {"nsa_metadata_layout": "indirect"}, precompute=True),
    Case("speculative, eager", SPECULATIVE | {"disable_cuda_graph": True}),
    Case("speculative, chunked", SPECULATIVE | {"chunked_prefill_size": 37}, precompute=True, rounds=2),
    Case("speculative, no prefix cache", SPECULATIVE | {"disable_radix_cache": True}, precompute=True),
    Case("speculative, retracted", SPECULATIVE | LITTLE_MEMORY, precompute=True, rounds=2, retracts=True),
]


def make_engine(model: Path, **args: Any) -> Engine:
    options = {"device": "cpu", "dtype": "float32", "max_running_requests": 6, "max_total_tokens": 8192}
    return Engine(model_path=str(model), **(options | {"chunked_prefill_size": -1} | args))


def generate(engine: Engine, alone: bool) -> list[list[int]]:
    if alone:
        pairs = zip(prompts(), sampling_params())
        return [engine.generate(input_ids=ids, sampling_params=params)["output_ids"] for ids, params in pairs]
    results = engine.generate(input_ids=prompts(), sampling_params=sampling_params())
    return [result["output_ids"] for result in results]


@pytest.fixture(scope="module")
def expected(dummy_model: Path) -> list[list[int]]:
    """Each request alone, without any of what the cases add."""
    return generate(make_engine(dummy_model, disable_radix_cache=True, disable_cuda_graph=True), alone=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_do_not_change(case: Case, dummy_model: Path, expected: list[list[int]]) -> None:
    with envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA.override(case.precompute):
        engine = make_engine(dummy_model, **case.args)
    for _ in range(case.rounds):
        tokens = generate(engine, case.alone)
        for i, (got, want) in enumerate(zip(tokens, expected)):
            assert got == want, f"request {i}"
    (state,) = engine.get_server_info()["internal_states"]
    assert state["leak"] is None
    assert state["available_pages"] + state["evictable_pages"] == state["total_pages"]
    assert (state["num_retractions"] > 0) == case.retracts
    if case.rounds > 1 and not case.retracts:
        assert (state["cache_hit_rate"] > 0.4) == (not case.args.get("disable_radix_cache", False))
    if case.args.get("speculative_algorithm"):
        assert state["nsa_metadata"]["enabled"] == case.precompute
        assert 1.1 < state["avg_spec_accept_length"] < 1 + case.args["speculative_num_steps"]


def test_requests_differ(expected: list[list[int]]) -> None:
    """The comparison above would be worth little if all outputs were the same."""
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert all(len(tokens) == NEW_TOKENS and len(set(tokens)) > 8 for tokens in expected)


def test_a_stop_inside_a_speculative_step_drops_what_follows(
    dummy_model: Path, expected: list[list[int]]
) -> None:
    engine = make_engine(dummy_model, **SPECULATIVE)
    cuts = [want[: want.index(want[NEW_TOKENS // 2]) + 1] for want in expected]
    stopped = engine.generate(
        input_ids=prompts(),
        sampling_params=[
            params | {"stop_token_ids": [cut[-1]]} for params, cut in zip(sampling_params(), cuts)
        ],
    )
    # What was speculated beyond the stop must not be found as anybody's prefix.
    continued = engine.generate(
        input_ids=[ids + cut for ids, cut in zip(prompts(), cuts)],
        sampling_params=[
            params | {"max_new_tokens": NEW_TOKENS - len(cut)} for params, cut in zip(sampling_params(), cuts)
        ],
    )
    for first, second, cut, want in zip(stopped, continued, cuts, expected):
        assert first["meta_info"]["finish_reason"] == {"type": "stop", "matched": cut[-1]}
        assert first["output_ids"] == cut
        assert second["output_ids"] == want[len(cut) :]
    assert engine.scheduler.queue.num_cached_tokens > 0


# The engine's own interface


@pytest.fixture(scope="module")
def engine(dummy_model: Path) -> Engine:
    return make_engine(dummy_model, **SPECULATIVE)


def test_stream_is_the_answer_in_pieces(engine: Engine) -> None:
    params = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    whole = engine.generate("Hello, world", params)
    pieces = list(engine.generate("Hello, world", params, stream=True))
    assert pieces[-1]["text"] == whole["text"]
    assert pieces[-1]["output_ids"] == whole["output_ids"]
    assert all(b["text"].startswith(a["text"]) for a, b in pairwise(pieces))
    assert len(pieces) > 2


def test_a_stream_that_is_left_frees_its_request(engine: Engine) -> None:
    stream = engine.generate(["one", "two"], {"max_new_tokens": 500, "ignore_eos": True}, stream=True)
    assert {next(stream)["index"], next(stream)["index"]} == {0, 1}
    stream.close()
    assert engine.flush_cache().success  # the abort is handled in the same step
    assert engine.scheduler.is_idle
    assert engine.scheduler.check_memory() is None


def test_generate_while_a_stream_is_open(engine: Engine) -> None:
    params = {"max_new_tokens": 10, "temperature": 0, "ignore_eos": True}
    alone = engine.generate("open", params)["output_ids"]
    stream = engine.generate("open", params, stream=True)
    next(stream)
    assert not engine.flush_cache().success
    engine.generate("other", params)
    *_, last = stream
    assert last["output_ids"] == alone


def test_logprobs_are_the_same_with_and_without_speculation(engine: Engine, dummy_model: Path) -> None:
    plain = make_engine(dummy_model, chunked_prefill_size=16)
    for params in ({"temperature": 0}, {"temperature": 1.0, "seed": 2}):
        a, b = (
            one.generate(
                input_ids=prompts()[2],
                sampling_params=params | {"max_new_tokens": 9, "ignore_eos": True},
                return_logprob=True,
                logprob_start_len=0,
                top_logprobs_num=3,
            )
            for one in (engine, plain)
        )
        for side, length in (("input", 63), ("output", 9)):
            tokens = [[token for _, token, _ in x["meta_info"][f"{side}_token_logprobs"]] for x in (a, b)]
            values = [[value for value, _, _ in x["meta_info"][f"{side}_token_logprobs"]] for x in (a, b)]
            assert tokens[0] == tokens[1] == (prompts()[2] if side == "input" else a["output_ids"])
            assert len(values[0]) == length
            start = side == "input"  # nothing predicts the first token
            assert values[0][start:] == pytest.approx(values[1][start:], abs=1e-4)
            tops = a["meta_info"][f"{side}_top_logprobs"]
            assert all(len(top) == 3 for top in tops[start:])
        assert a["meta_info"]["input_token_logprobs"][0][0] is None


def test_a_rid_that_is_used_again_brings_its_own_parameters(dummy_model: Path) -> None:
    engine = make_engine(dummy_model)
    texts = []
    for rid in ("same", "same", "other"):
        params = SamplingParams(temperature=1.0 if texts else 0.0, seed=1, max_new_tokens=8, ignore_eos=True)
        engine.link.inbox.append(TokenizedGenerateReqInput(rid=rid, input_ids=[5, 6], sampling_params=params))
        outputs: list[int] = []
        while engine.link.inbox or not engine.scheduler.is_idle:
            engine.scheduler.step()
            outputs += [t for message in engine.link.outbox for o in message.outputs for t in o.output_ids]
            engine.link.outbox.clear()
        texts.append(outputs)
    assert texts[1] == texts[2] != texts[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "either prompt or input_ids"),
        ({"prompt": "a", "input_ids": [1]}, "either prompt or input_ids"),
        ({"input_ids": []}, "the prompt is empty"),
        ({"input_ids": [[]]}, "the prompt is empty"),
        ({"prompt": []}, "text must hold at least one prompt"),
        ({"prompt": "a", "image_data": "b.png"}, "image_data='b.png' is not supported"),
        ({"prompt": "a", "return_logprobs": True}, "unknown parameter return_logprobs"),
        ({"prompt": "a", "sampling_params": {"temperature": object()}}, "no JSON value"),
        ({"prompt": "a", "return_logprob": True, "top_logprobs_num": 99}, "top_logprobs_num must be in"),
        ({"input_ids": [[1], []]}, "the prompt is empty"),
        ({"input_ids": [320]}, "got 320"),
        ({"prompt": "a", "sampling_params": {"tempreture": 0}}, "unknown parameter .*tempreture"),
        ({"prompt": "a", "sampling_params": {"temperature": "hot"}}, "temperature"),
        ({"prompt": "a", "sampling_params": {"top_p": 0.0}}, "top_p must be in"),
        ({"prompt": ["a", "b"], "sampling_params": [{}]}, "1 values for 2 prompts"),
        ({"prompt": "a" * 2048}, "2048 tokens; the maximum is 2047"),
    ],
)
def test_wrong_calls_are_refused(engine: Engine, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(**call)
    assert engine.scheduler.is_idle
