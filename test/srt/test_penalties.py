"""Penalties, logit_bias and min_new_tokens: by plain loops, and the same tokens whatever else happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_cases import DEVICES
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.environ import envs
from sglang.srt.layers.sampler import sample
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.penalty_pool import SUPPRESSED, PenaltyPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_loader import load_model
from sglang.srt.sampling.sampling_params import MAX_LOGIT_BIAS, SamplingParams
from test_engine_invariance import CASES, SPECULATIVE, Case, make_engine, prompts
from tiny_models import PagedDriver

VOCAB, EOS = 12, 3
NEW_TOKENS = 20
CHOSEN = {  # of the cases in which tokens may not change
    "in a batch",
    "chunked",
    "retracted",
    "speculative, flag 1",
    "speculative, in graph",
    "speculative, chunked",
    "speculative, retracted",
}


def penalized(
    logits: Sequence[float], params: SamplingParams, output_ids: Sequence[int], eos: Sequence[int] = (EOS,)
) -> list[np.float32]:
    """The reference, token by token, in float32: what a token is sampled from after `output_ids`."""
    f32 = np.float32
    result = []
    for token, logit in enumerate(map(f32, logits)):
        count = list(output_ids).count(token)
        logit = logit - (
            f32(count) * f32(params.frequency_penalty) + f32(count > 0) * f32(params.presence_penalty)
        )
        if count:
            scale = f32(params.repetition_penalty)
            logit = logit * scale if logit < 0 else logit / scale
        logit = logit + f32((params.logit_bias or {}).get(str(token), 0))
        if len(output_ids) < params.min_new_tokens and token in {*eos, *params.stop_token_ids}:
            logit = f32(SUPPRESSED)
        result.append(logit)
    return result


params_strategy = st.builds(
    SamplingParams,
    max_new_tokens=st.just(8),
    frequency_penalty=st.sampled_from([0.0, 0.3, -2.0]),
    presence_penalty=st.sampled_from([0.0, 1.1, -0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5, 1e-5, 2.0]),
    logit_bias=st.none() | st.dictionaries(st.sampled_from([*map(str, range(VOCAB))]), st.floats(-100, 100)),
    min_new_tokens=st.integers(0, 8),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
)
tokens_strategy = st.lists(st.integers(0, VOCAB - 1), max_size=6)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_apply_equals_the_reference(device: str, data: st.DataObject) -> None:
    """Rows are used again and again; every request has a prompt, outputs and drafts of its own."""
    pool = PenaltyPool(4, VOCAB, [EOS], device)
    rows = data.draw(st.integers(1, 4))
    for _ in range(data.draw(st.integers(1, 3))):
        indices = data.draw(st.permutations([1, 2, 3]))[: data.draw(st.integers(1, 3))]
        requests = []
        for index in indices:
            params, outputs = data.draw(params_strategy), data.draw(tokens_strategy)
            prompt_len = data.draw(st.integers(1, 5))
            pool.set_request(index, params, prompt_len, outputs)
            requests.append((params, outputs, prompt_len))
        logits = torch.randn((len(indices), rows, VOCAB), generator=torch.Generator().manual_seed(rows)) * 4
        tokens = torch.randint(0, VOCAB, (len(indices), rows))
        positions = torch.tensor(
            [[p + len(o) + j for j in range(rows)] for _, o, p in requests], device=device
        )
        on_device = torch.tensor(indices, device=device), tokens.to(device)
        found = logits.to(device, copy=True)
        pool.apply(found, positions, on_device[0], on_device[1][:, :-1])
        for i, (params, outputs, _) in enumerate(requests):
            for row in range(rows):
                seen = outputs + tokens[i, :row].tolist()
                expected = penalized(logits[i, row].tolist(), params, seen)
                assert found[i, row].tolist() == [float(x) for x in expected], (params, seen)
        # Then some of the tokens are accepted: the counts are those of the longer outputs.
        lens = torch.tensor([data.draw(st.integers(0, rows)) for _ in indices], device=device)
        pool.add_outputs(*on_device, lens)
        found = logits[:, :1].to(device, copy=True)
        pool.apply(found, positions[:, :1] + lens[:, None], on_device[0])
        for i, (params, outputs, _) in enumerate(requests):
            seen = outputs + tokens[i, : lens[i]].tolist()
            expected = penalized(logits[i, 0].tolist(), params, seen)
            assert found[i, 0].tolist() == [float(x) for x in expected], (params, seen)


def test_nothing_is_allocated_and_nothing_changes_for_requests_that_ask_for_nothing() -> None:
    pool = ReqToTokenPool(3, 16, 4, "cpu", VOCAB, [EOS]).penalties
    pool.set_request(1, SamplingParams(), 4, [5, 5])
    assert pool.output_counts is None and pool.logit_bias is None and pool.stop_tokens is None
    everything = SamplingParams(
        frequency_penalty=1, presence_penalty=1, repetition_penalty=1.5, logit_bias={"5": 9}, min_new_tokens=9
    )
    pool.set_request(2, everything, 4, [5, 5])
    pool.set_request(2, SamplingParams(), 4, [])  # the row's next owner
    logits = torch.randn((2, 1, VOCAB))
    found = logits.clone()
    pool.apply(found, torch.tensor([[4], [4]]), torch.tensor([1, 2]))
    assert torch.equal(found, logits)


def test_a_row_of_stops_alone_still_gives_numbers() -> None:
    pool = PenaltyPool(2, VOCAB, [EOS], "cpu")
    pool.set_request(1, SamplingParams(min_new_tokens=2, stop_token_ids=tuple(range(VOCAB))), 4, [])
    logits = torch.randn((1, 1, VOCAB))
    pool.apply(logits, torch.tensor([[4]]), torch.tensor([1]))
    assert torch.isfinite(logits.log_softmax(-1)).all()


NAN, INF = float("nan"), float("inf")
WRONG: list[tuple[str, list[Any], str]] = [
    ("frequency_penalty", [-2.1, 3, NAN, 1e39], r"in \[-2, 2\]"),
    ("presence_penalty", [-2.1, 3, NAN, -INF], r"in \[-2, 2\]"),
    ("repetition_penalty", [0, -1, 2.01, INF, 1e-46], "in"),
    ("min_new_tokens", [-1, 129], r"in \[0, 128\]"),
    ("logit_bias", [{"5": value} for value in (100.5, -101, NAN)], r"in \[-100, 100\]"),
    ("logit_bias", [{"320": 1.0}], r"tokens in \[0, 320\), got 320"),
    ("logit_bias", [{key: 1.0} for key in ("", "x", "-1", "05", "1e2", "\u0665", "9" * 5000)], "token ids"),
    ("logit_bias", [{str(i): 0.0 for i in range(MAX_LOGIT_BIAS + 1)}], f"at most {MAX_LOGIT_BIAS}"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(name, value, message) for name, values, message in WRONG for value in values],
    ids=lambda value: str(value)[:20],
)
def test_validation(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must .*{message}") as error:
        SamplingParams(**{name: value}).validate(320)
    assert len(str(error.value)) < 200


# The whole engine


KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "frequency_penalty": 0.9},
    {"temperature": 0.9, "presence_penalty": 1.7, "repetition_penalty": 1.4},
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.9},
    {"temperature": 0, "logit_bias": {"7": 9.5, "8": -100, "250": 9.25}, "frequency_penalty": 0.4},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "presence_penalty": -1.2, "frequency_penalty": 0.6},
    {"temperature": 0.7, "frequency_penalty": -0.3, "repetition_penalty": 0.9},
)


def sampling_params() -> list[dict[str, Any]]:
    common = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return [{**common, **KINDS[i % len(KINDS)], "seed": 500 + i} for i in range(len(prompts()))]


class Reference:
    """One token at a time over a cache of its own, with the penalties of the loops above."""

    def __init__(self, model: Path) -> None:
        self.config = ModelConfig.from_path(str(model), None, "float32", "cpu")
        self.target = load_model(self.config, with_nextn=False)[0]

    @torch.inference_mode()
    def generate(self, prompt: list[int], params: SamplingParams, count: int) -> list[int]:
        driver = PagedDriver(self.config, self.config.num_hidden_layers)
        logits = driver.run(self.target, [(1, 0, prompt)], ForwardMode.EXTEND)[-1]
        outputs: list[int] = []
        while True:
            scores = penalized(logits.tolist(), params, outputs, self.config.eos_token_ids)
            position = len(prompt) + len(outputs)
            row = (params.temperature, params.top_p, max(params.top_k, 0), params.min_p, params.seed)
            columns = [torch.tensor([value]) for value in row]
            rows = torch.tensor(np.array(scores))[None]
            outputs.append(int(sample(rows, torch.tensor([position]), *columns)))
            if len(outputs) == count:
                return outputs
            logits = driver.run(self.target, [(1, position, outputs[-1:])], ForwardMode.EXTEND)[-1]


@pytest.fixture(scope="module")
def reference(dummy_model: Path) -> Reference:
    return Reference(dummy_model)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[list[int]]:
    return [
        reference.generate(prompt, SamplingParams(**params), NEW_TOKENS)
        for prompt, params in zip(prompts(), sampling_params())
    ]


def generate(engine: Engine, params: list[dict[str, Any]]) -> list[list[int]]:
    results = engine.generate(input_ids=prompts(), sampling_params=params)
    return [result["output_ids"] for result in results]


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CHOSEN], ids=lambda case: case.name)
def test_tokens_equal_the_reference(case: Case, dummy_model: Path, expected: list[list[int]]) -> None:
    """The penalty of a verified row counts the drafts before it; a retracted request keeps its counts."""
    with envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA.override(case.precompute):
        engine = make_engine(dummy_model, **case.args)
    for i, (got, want) in enumerate(zip(generate(engine, sampling_params()), expected)):
        assert got == want, f"request {i}"
    (state,) = engine.get_server_info()["internal_states"]
    assert (state["num_retractions"] > 0) == case.retracts
    if case.args.get("speculative_algorithm"):
        assert state["avg_spec_accept_length"] > 1.02, "no draft was ever accepted under penalties"


def test_a_penalty_that_ends_a_run_inside_a_verification(dummy_model: Path) -> None:
    """Target and drafts repeat the last token until its penalty says otherwise: were the drafts before a row
    not counted, the run would go on to the end of the step."""
    outputs = []
    for args in ({}, SPECULATIVE):
        engine = make_engine(dummy_model, **args)
        worker = engine.scheduler.worker
        target = worker.target.model
        models = [target] + ([worker.nextn.model] if args else [])
        with torch.inference_mode():
            for name, weight in [item for model in models for item in model.named_parameters()]:
                if weight.dim() >= 2 and "embed" not in name:
                    weight.zero_()
            embed = target.model.embed_tokens.weight
            embed.normal_(generator=torch.Generator().manual_seed(0))
            target.lm_head.weight.copy_(embed)
            if args:
                models[1].eh_proj.weight[:, : embed.shape[1]].copy_(torch.eye(embed.shape[1]))
        params = {"temperature": 0, "max_new_tokens": 45, "ignore_eos": True, "frequency_penalty": 2.0}
        results = engine.generate(input_ids=[[7, t] for t in range(5)], sampling_params=params)
        outputs.append([result["output_ids"] for result in results])
    assert outputs[0] == outputs[1]
    assert all(len(set(tokens)) > 1 for tokens in outputs[0])


def test_penalties_matter(dummy_model: Path, expected: list[list[int]]) -> None:
    """The comparison above would be worth little if they changed nothing."""
    plain = [
        {name: value for name, value in params.items() if "penalty" not in name and name != "logit_bias"}
        for params in sampling_params()
    ]
    changed = [a != b for a, b in zip(generate(make_engine(dummy_model), plain), expected)]
    assert not changed[2], "a request without penalties beside others with them"
    assert sum(changed) >= 5
    assert max(Counter(expected[4]).values()) > 3  # a bias of 9 against repetition


@pytest.mark.parametrize("args", [{}, SPECULATIVE], ids=["plain", "speculative"])
@pytest.mark.parametrize("stop", ["eos", "stop_token_ids"])
def test_min_new_tokens(stop: str, args: dict[str, Any], dummy_model: Path, reference: Reference) -> None:
    """Every token is made likely to end the request; none may before its time, and then one soon does."""
    engine = make_engine(dummy_model, **args)
    ends = sorted(reference.config.eos_token_ids) if stop == "eos" else list(range(0, 320, 2))
    common = {"temperature": 0, "max_new_tokens": 40, "logit_bias": {str(t): 60.0 for t in ends}}
    if stop == "stop_token_ids":
        common["stop_token_ids"] = ends
    counts = (0, 1, 2, 7, 14)
    requests = [common | {"min_new_tokens": count} for count in counts]
    results = engine.generate(input_ids=prompts()[: len(counts)], sampling_params=requests)
    for prompt, count, params, result in zip(prompts(), counts, requests, results):
        assert len(result["output_ids"]) == count + 1
        assert result["meta_info"]["finish_reason"]["type"] == "stop"
        wanted = SamplingParams(
            **params | {"stop_token_ids": tuple(params.get("stop_token_ids", ()))}, seed=0
        )
        assert result["output_ids"] == reference.generate(prompt, wanted, count + 1)


def test_logprobs_are_those_after_the_penalties(dummy_model: Path) -> None:
    """As SGLang's: a token that a bias forces has a high logprob, a suppressed one a finite, low one."""
    for args in ({}, SPECULATIVE):
        engine = make_engine(dummy_model, **args)
        result = engine.generate(
            input_ids=prompts()[2],
            sampling_params={
                "temperature": 0,
                "max_new_tokens": 9,
                "min_new_tokens": 9,
                "logit_bias": {7: 100.0},
                "stop_token_ids": [t for t in range(320) if t not in (7, 9)],
            },
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=3,
        )
        meta = result["meta_info"]
        assert result["output_ids"] == [7] * 9
        assert all(value > -1e-3 for value, _, _ in meta["output_token_logprobs"])
        for top in meta["output_top_logprobs"]:
            assert [token for _, token, _ in top[:2]] == [7, 9]
            assert -float("inf") < top[2][0] < -1e30
        prompt = [value for value, _, _ in meta["input_token_logprobs"][1:]]
        assert max(prompt) < -1e-2 and min(prompt) > -1e3  # of the model itself
