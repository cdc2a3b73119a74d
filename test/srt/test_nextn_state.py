"""The NextN layer's state does not depend on how a request got where it is.

Its keys at positions 0 .. kv_len - 1, its output and first draft at the last of them: after partly accepted
drafts, chunks, a warm prefix cache and retraction they are what one prefill of the same tokens leaves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

STEPS = 4
PAGE = 16
_RNG = random.Random(11)
STEM = _RNG.choices(range(256), k=70)
PROMPTS = [
    STEM + _RNG.choices(range(256), k=30),
    STEM[: 4 * PAGE],  # ends with a page: whether that page is shared depends on the token after it
    STEM[: 4 * PAGE] + _RNG.choices(range(256), k=3),
    _RNG.choices(range(256), k=41),
]


@dataclass(frozen=True)
class State:
    """All that the next step's drafts are made from."""

    tokens: list[int]  # the committed ones and the one after them
    kv: torch.Tensor  # [kv_len, kv_width], float32
    index_k: torch.Tensor  # [kv_len, index_head_dim], float32
    draft_hidden: torch.Tensor  # [hidden], float32
    draft_token: int

    @classmethod
    def of(cls, engine: Engine, req: Req) -> State:
        worker, row = engine.scheduler.worker, req.req_pool_idx
        pool, cache = worker.req_to_token_pool, worker.nextn.token_to_kv_pool
        slots = pool.req_to_token[row, : req.kv_len].long()
        return cls(
            tokens=req.token_ids[: req.kv_len + 1],
            kv=cache.kv_buffer[0][slots],
            index_k=cache.index_k_buffer[0][slots],
            draft_hidden=pool.draft_hidden[row].clone(),
            draft_token=int(pool.draft_token[row]),
        )


@dataclass(frozen=True)
class Case:
    name: str
    args: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.0
    rounds: int = 1  # in the second, the prompts are in the cache
    retracts: bool = False


CASES = [
    Case("greedy"),
    Case("sampled", temperature=0.7),
    Case("eager", {"disable_cuda_graph": True}),
    Case("chunked", {"chunked_prefill_size": 7}),
    Case("warm", rounds=2),
    Case("warm and chunked", {"chunked_prefill_size": 21}, temperature=0.7, rounds=2),
    Case("retracted", {"max_total_tokens": PAGE * 14}, retracts=True),
]


def make_engine(model: Path, **args: Any) -> Engine:
    options = {"device": "cpu", "dtype": "float32", "max_running_requests": 4, "max_total_tokens": 4096}
    options |= {"speculative_algorithm": "NEXTN", "speculative_num_steps": STEPS, "page_size": PAGE}
    return Engine(model_path=str(model), **(options | {"chunked_prefill_size": -1} | args))


def add(engine: Engine, rid: str, tokens: list[int], seed: int, temperature: float, new: int) -> None:
    params = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=new, ignore_eos=True)
    engine.link.inbox.append(TokenizedGenerateReqInput(rid=rid, input_ids=tokens, sampling_params=params))


def states(engine: Engine, case: Case) -> Iterator[tuple[int, State, int]]:
    """Of every request before each of its decode steps: its number, its state, how many tokens that gave."""
    for i, prompt in enumerate(PROMPTS):
        add(engine, str(i), prompt, i, case.temperature, 22)
    scheduler = engine.scheduler
    scheduler.step()
    while not scheduler.is_idle:
        before = {req.rid: (req, State.of(engine, req), req.seqlen) for req in scheduler.running}
        scheduler.step()
        for rid, (req, state, length) in before.items():
            yield int(rid), state, req.seqlen - length


@pytest.fixture(scope="module")
def fresh(dummy_model: Path) -> Engine:
    return make_engine(dummy_model, disable_radix_cache=True, disable_cuda_graph=True)


def prefilled(engine: Engine, tokens: list[int], seed: int, temperature: float) -> State:
    """The state after one prefill of all but the last of `tokens`, which must be what it samples."""
    add(engine, "fresh", tokens[:-1], seed, temperature, 8)
    engine.scheduler.step()
    state = State.of(engine, engine.scheduler.requests["fresh"])
    engine.scheduler.finish(engine.scheduler.requests["fresh"], {"type": "abort"})
    return state


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_state_equals_that_of_a_fresh_prefill(case: Case, dummy_model: Path, fresh: Engine) -> None:
    engine = make_engine(dummy_model, **case.args)
    accepted: set[int] = set()
    compared = 0
    for _ in range(case.rounds):
        for i, state, new_tokens in states(engine, case):
            accepted |= {new_tokens} - {0}  # 0: others were prefilled, or it was retracted
            if compared % 3 == 0:  # a third of them is enough
                expected = prefilled(fresh, state.tokens, i, case.temperature)
                assert state.tokens == expected.tokens
                assert state.draft_token == expected.draft_token
                for name in ("kv", "index_k", "draft_hidden"):
                    torch.testing.assert_close(
                        getattr(state, name), getattr(expected, name), rtol=1e-3, atol=1e-4, msg=name
                    )
            compared += 1
    assert compared > 30
    assert {1, 2} <= accepted and len(accepted) > 2, f"no partial acceptance: {accepted}"
    assert (engine.scheduler.num_retractions > 0) == case.retracts
    if case.rounds > 1:
        assert engine.scheduler.queue.num_cached_tokens > 2 * PAGE * len(PROMPTS)
