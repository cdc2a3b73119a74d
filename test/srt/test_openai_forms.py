"""OpenAI's completions in their rarer forms: echo, no new tokens, best_of, usage of chunks, model names."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fixture import RunningServer

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
PROMPT = "def fibonacci(n):"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
Json = dict[str, Any]


def post(client: httpx.Client, path: str, **body: Any) -> Json:
    return client.post(path, json=body).raise_for_status().json()


def chunks(client: httpx.Client, path: str, **body: Any) -> list[Json]:
    lines = client.post(path, json=body | {"stream": True}).raise_for_status().text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def joined(events: list[Json], index: int) -> tuple[str, Json | None]:
    """The text of one choice of a stream, and its logprobs."""
    mine = [c for e in events for c in e["choices"] if c["index"] == index]
    parts = [c["logprobs"] for c in mine if c["logprobs"]]
    together = {key: [v for part in parts for v in part[key]] for key in parts[0]} if parts else None
    return "".join(c["text"] for c in mine), together


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 12])
def test_echo_puts_the_prompt_before_the_answer(client: httpx.Client, as_ids: bool, max_tokens: int) -> None:
    body = GREEDY | {"max_tokens": max_tokens} | ({"prompt": list(PROMPT.encode())} if as_ids else {})
    plain = post(client, COMPLETIONS, **body)["choices"][0]
    echoed = post(client, COMPLETIONS, **body, echo=True)["choices"][0]
    assert echoed == plain | {"text": PROMPT + plain["text"]}
    assert joined(chunks(client, COMPLETIONS, **body, echo=True), 0)[0] == PROMPT + plain["text"]


@pytest.mark.parametrize("max_tokens", [0, 1, 12])
@pytest.mark.parametrize("top", [0, 2])
def test_echo_with_logprobs_scores_the_prompt(client: httpx.Client, max_tokens: int, top: int) -> None:
    body = GREEDY | {"max_tokens": max_tokens, "logprobs": top, "echo": True}
    answer = post(client, COMPLETIONS, **body)
    choice, logprobs = answer["choices"][0], answer["choices"][0]["logprobs"]
    assert answer["usage"]["completion_tokens"] == max_tokens and choice["finish_reason"] == "length"
    assert {len(values) for values in logprobs.values()} == {len(PROMPT) + max_tokens}
    assert "".join(logprobs["tokens"][: len(PROMPT)]) == PROMPT
    assert logprobs["text_offset"][: len(PROMPT)] == list(range(len(PROMPT)))
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert all(bool(entry) == bool(top) for entry in logprobs["top_logprobs"][1:])
    native = post(
        client,
        GENERATE,
        text=PROMPT,
        return_logprob=True,
        logprob_start_len=0,
        sampling_params={"max_new_tokens": 0},
    )
    expected = [value for value, _, _ in native["meta_info"]["input_token_logprobs"]]
    assert logprobs["token_logprobs"][1 : len(PROMPT)] == pytest.approx(expected[1:], abs=1e-4)
    text, streamed = joined(chunks(client, COMPLETIONS, **body), 0)
    assert text == choice["text"] and streamed["tokens"] == logprobs["tokens"]
    assert streamed["text_offset"] == logprobs["text_offset"]


def test_echo_of_a_batch_with_choices(client: httpx.Client) -> None:
    """Each choice has its own prompt before it, streamed or not."""
    prompts = ["one", "two, three"]
    body = GREEDY | {"prompt": prompts, "n": 2, "best_of": 2, "echo": True, "temperature": 1.0, "seed": 5}
    whole = [choice["text"] for choice in post(client, COMPLETIONS, **body)["choices"]]
    assert [text.startswith(prompts[i // 2]) for i, text in enumerate(whole)] == [True] * 4
    events = chunks(client, COMPLETIONS, **body)
    assert [joined(events, i)[0] for i in range(4)] == whole


def test_no_new_tokens(client: httpx.Client) -> None:
    """`max_new_tokens: 0` runs the prompt and nothing more: the next request finds it in the cache."""
    text = "a prompt to warm the cache with, " * 5
    answer = post(client, GENERATE, text=text, sampling_params={"max_new_tokens": 0})
    assert (answer["text"], answer["output_ids"]) == ("", [])
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    after = post(client, GENERATE, text=text, sampling_params={"max_new_tokens": 1})
    assert after["meta_info"]["cached_tokens"] >= 64
    events = chunks(client, COMPLETIONS, **GREEDY | {"max_tokens": 0})
    assert [e["choices"][0]["finish_reason"] for e in events] == ["length"]


@pytest.mark.parametrize("include_usage", [False, True])
def test_usage_in_every_chunk(client: httpx.Client, include_usage: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": include_usage}
    events = chunks(client, COMPLETIONS, **GREEDY, n=2, stream_options=options)
    if include_usage:
        last = events.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 24
    for index in range(2):
        usages = [e["usage"] for e in events if e["choices"][0]["index"] == index]
        tokens = [u["completion_tokens"] for u in usages]
        assert tokens == sorted(tokens) and tokens[0] < 12 and tokens[-1] == 12
        assert {u["prompt_tokens"] for u in usages} == {len(PROMPT)}
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream_options": options}
    events = chunks(client, CHAT, **chat)
    assert all(e["usage"]["total_tokens"] >= e["usage"]["prompt_tokens"] > 0 for e in events)


def test_rid_is_the_answers_id_and_aborts_it(server: RunningServer) -> None:
    """Bug: the forms of OpenAI refused SGLang's `rid`, null too."""
    body = {"prompt": "x", "n": 2, "max_tokens": 1900, "ignore_eos": True, "rid": "mine"}
    with ThreadPoolExecutor(1) as pool, server.client() as client:
        answer = pool.submit(post, client, COMPLETIONS, **body)
        server.wait_state(num_running_reqs=2)
        with server.client() as other:
            assert other.post("/abort_request", json={"rid": "mine"}).json()["aborted"] == 2
        assert answer.result()["id"] == "mine"
        assert [c["finish_reason"] for c in answer.result()["choices"]] == ["abort", "abort"]
        named = post(client, COMPLETIONS, **GREEDY, rid=None)["id"]
    assert named.startswith("cmpl-")


def test_names_of_the_model(client: httpx.Client, dummy_model: Path) -> None:
    """It answers to all of its names, and as SGLang to a wrong one; only what was asked for is not echoed."""
    for name in ("dummy", str(dummy_model), dummy_model.name):
        assert client.get(f"/v1/models/{name}").json()["id"] == "dummy"
    for name in ("dummy", str(dummy_model), dummy_model.name, "gpt-17", "default", None):
        answer = post(client, COMPLETIONS, **GREEDY, model=name)
        assert answer["model"] == "dummy"
