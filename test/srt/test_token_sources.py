"""`return_token_sources`: each token's source is what the worker's steps say, whatever happens to it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
import torch
from history_worker import HistoryWorker
from scheduler_harness import Harness, greedy, prompt_of
from server_fixture import ROOT
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.schedule_batch import Req, StepOutput
from sglang.srt.speculative import eagle_info
from sglang.srt.speculative.eagle_info import count_accepted
from test_http_generate import GENERATE, PROMPT, events

SPECULATIVE = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 4}


class RecordingWorker(HistoryWorker):
    """Notes how many tokens each step made of each request."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps: dict[str, list[int]] = {}

    def prefill(self, chunks: list[Any]) -> StepOutput:
        output = super().prefill(chunks)
        for chunk, tokens in zip(chunks, output.tokens):
            self.steps.setdefault(chunk.req.rid, []).append(len(tokens))
        return output

    def decode(self, reqs: list[Req]) -> StepOutput:
        output = super().decode(reqs)
        for req, tokens in zip(reqs, output.tokens):
            self.steps[req.rid].append(len(tokens))
        return output

    def sources(self, rid: str, count: int) -> list[int]:
        return [s for made in self.steps[rid] if made for s in [*range(1, made), 0]][:count]


@pytest.mark.parametrize(
    ("lookahead", "num_pages", "chunk", "retracts"),
    [(1, 64, -1, False), (4, 64, -1, False), (4, 26, -1, True), (3, 26, 5, True)],
    ids=["plain", "speculative", "retracted", "chunked and retracted"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_sources_are_those_of_the_steps(
    lookahead: int, num_pages: int, chunk: int, retracts: bool, stream: bool
) -> None:
    worker = RecordingWorker(lookahead=lookahead, num_pages=num_pages)
    harness = Harness(worker, chunk)
    options = {"stream": stream, "return_token_sources": True}
    counts = [9 + 3 * i for i in range(8)]
    rids = [harness.send(prompt_of(9, i), max_new_tokens=n, **options) for i, n in enumerate(counts)]
    harness.finish()
    assert (harness.scheduler.num_retractions > 0) == retracts
    for rid, count in zip(rids, counts):
        assert harness.results[rid].output_token_sources == worker.sources(rid, count)
    seen = {source for rid in rids for source in harness.results[rid].output_token_sources}
    assert seen == set(range(lookahead))


def test_a_stop_in_the_middle_of_a_step_ends_the_sources() -> None:
    tokens = greedy(prompt_of(6), 20)
    cut = 0
    for end, token in enumerate(tokens, 1):
        if token in tokens[: end - 1]:
            continue
        worker = RecordingWorker(lookahead=4)
        options = {"max_new_tokens": 20, "stop_token_ids": (token,), "return_token_sources": True}
        harness = Harness(worker)
        rid = harness.send(prompt_of(6), **options)
        harness.finish()
        assert harness.results[rid].output_token_sources == worker.sources(rid, end)
        cut += sum(worker.steps[rid]) > end
    assert cut > 3, "no stop was in the middle of a step"


def test_nothing_is_kept_or_sent_unasked() -> None:
    harness = Harness(HistoryWorker(lookahead=4))
    result = harness.run(prompt_of(6))
    assert result.output_token_sources == [] and result.last.output_token_sources is None


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model_path=str(ROOT / "models" / "tiny-nsa"), device="cpu", **SPECULATIVE) as engine:
        yield engine


def test_accepted_drafts_are_what_the_draft_layer_proposed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the drafts themselves, as each verification gets them."""
    drafted: list[list[int]] = []

    def recorded(draft_tokens: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
        drafted.append(draft_tokens[0].tolist())
        return count_accepted(draft_tokens, next_tokens)

    monkeypatch.setattr(eagle_info, "count_accepted", recorded)
    params = {"temperature": 0.7, "seed": 1, "max_new_tokens": 60, "ignore_eos": True}
    answer = engine.generate("def read_file(path):\n", params, return_token_sources=True)
    meta, ids = answer["meta_info"], answer["output_ids"][1:]
    assert meta["output_token_sources"][0] == 0
    drafts = iter(drafted)
    step = next(drafts)
    for token, source in zip(ids, meta["output_token_sources"][1:]):
        if source:
            assert token == step[source - 1]
            accepted = source
        else:
            step = next(drafts, [])
            accepted = 0
    assert len(drafted) == meta["spec_verify_ct"] and accepted in range(5)
    assert max(meta["output_token_sources"]) == 4
    own = meta["output_token_sources"].count(0)
    assert own - 1 in (meta["spec_verify_ct"], meta["spec_verify_ct"] - 1)  # the last step may be cut


def texts_of(chunk: dict[str, Any]) -> list[str]:
    offsets = [min(o, len(chunk["text"])) for o in chunk["meta_info"]["output_text_offsets"]]
    return [chunk["text"][a:b] for a, b in pairwise([0, *offsets])]


def test_over_http_streamed_and_whole(client: httpx.Client) -> None:
    body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}}
    plain = client.post(GENERATE, json=body).raise_for_status().json()
    assert not plain["meta_info"].keys() & {"output_token_sources", "output_text_offsets"}
    body["return_token_sources"] = True
    whole = client.post(GENERATE, json=body).raise_for_status().json()
    assert whole["text"] == plain["text"] == "".join(texts_of(whole))
    chunks = list(events(client, GENERATE, body))
    for chunk in chunks:
        for name in ("output_token_sources", "output_text_offsets"):
            given = chunk["meta_info"][name]
            assert len(given) == len(chunk["output_ids"])
            assert given == whole["meta_info"][name][: len(given)]
    assert len(chunks[-1]["output_ids"]) == 40


def test_the_flag_is_a_boolean(client: httpx.Client) -> None:
    response = client.post(GENERATE, json={"text": "x", "return_token_sources": 1})
    assert response.status_code == 400 and response.json()["error"]["param"] == "return_token_sources"
