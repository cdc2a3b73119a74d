"""The HTTP forms on a real server: streams, choices, stops, logprobs, seeds, aborts, the server's state."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_fixture import RunningServer

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
PROMPT = "def fibonacci(n):"


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event; checks the form of the stream."""
    done = False
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in filter(None, response.iter_lines()):
            assert line.startswith("data: ") and not done
            done = line == "data: [DONE]"
            if not done:
                yield json.loads(line.removeprefix("data: "))
    assert done


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    return client.post(COMPLETIONS, json={"prompt": PROMPT} | body).raise_for_status().json()


def generate(client: httpx.Client, text: str = PROMPT, **sampling: Any) -> dict[str, Any]:
    body = {"text": text, "sampling_params": sampling}
    return client.post(GENERATE, json=body).raise_for_status().json()


TOKENS = 24
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
SAMPLED = {"temperature": 1.5, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "seed": 7, "max_tokens": TOKENS}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("n", [1, 3])
def test_stream_equals_whole(client: httpx.Client, sampling: dict[str, Any], n: int) -> None:
    whole = complete(client, **sampling, n=n)
    chunks = list(events(client, COMPLETIONS, {"prompt": PROMPT, "n": n} | sampling))
    for index in range(n):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == whole["choices"][index]["text"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == whole["choices"][index]["finish_reason"] is not None


def test_chat_stream_equals_whole_with_usage(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]} | GREEDY
    whole = client.post(CHAT, json=body).raise_for_status().json()
    chunks = list(events(client, CHAT, body | {"stream_options": {"include_usage": True}}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert all(c["usage"] is None for c in chunks[:-1]) and chunks[-1]["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][key] == whole["usage"][key]
    assert whole["usage"]["completion_tokens"] == TOKENS
    # <bos><user>hi<assistant>: the template writes the special tokens
    assert whole["usage"]["prompt_tokens"] == 5


def test_native_stream_is_cumulative(client: httpx.Client) -> None:
    body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}}
    whole = client.post(GENERATE, json=body).raise_for_status().json()
    chunks = list(events(client, GENERATE, body))
    assert len(chunks) > 2
    for before, after in itertools.pairwise(chunks):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
    assert (chunks[-1]["text"], chunks[-1]["output_ids"]) == (whole["text"], whole["output_ids"])
    meta = whole["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(PROMPT), 30)
    assert meta["finish_reason"] == {"type": "length", "length": 30}
    assert 1 <= meta["spec_accept_length"] <= 4 and meta["spec_verify_ct"] >= 30 / 4 - 1
    assert meta["e2e_latency"] > 0


def test_text_and_ids_are_the_same_prompt(client: httpx.Client) -> None:
    by_text = complete(client, **GREEDY)["choices"][0]["text"]
    assert complete(client, prompt=list(PROMPT.encode()), **GREEDY)["choices"][0]["text"] == by_text
    native = generate(client, temperature=0, max_new_tokens=TOKENS, ignore_eos=True)
    assert native["text"] == by_text


def test_batches_keep_their_order(client: httpx.Client) -> None:
    prompts = ["one", "two, three", "four"]
    alone = [complete(client, prompt=p, **GREEDY)["choices"][0]["text"] for p in prompts]
    batch = complete(client, prompt=prompts, **GREEDY, n=1)
    assert [c["text"] for c in batch["choices"]] == alone
    assert [c["index"] for c in batch["choices"]] == [0, 1, 2]
    assert batch["usage"]["prompt_tokens"] == sum(map(len, prompts))
    short = [{"temperature": 0, "max_new_tokens": m, "ignore_eos": True} for m in (1, 2, 3)]
    body = {"text": prompts, "sampling_params": short, "rid": ["a", "b", "c"]}
    native = client.post(GENERATE, json=body).raise_for_status().json()
    assert [r["meta_info"]["id"] for r in native] == ["a", "b", "c"]
    assert [len(r["output_ids"]) for r in native] == [1, 2, 3]


def test_stop_strings_at_every_place(client: httpx.Client) -> None:
    """Any piece of the text as a stop string ends it there, streamed or not."""
    text = complete(client, **GREEDY)["choices"][0]["text"]
    places = [(i, size) for i in range(3, len(text) - 6, 5) for size in (1, 2, 5)]
    tried = 0
    for start, size in places[:12]:
        stop = text[start : start + size]
        if "\ufffd" in stop:  # not a string of its own: a part of a character
            continue
        tried += 1
        expected = text[: text.find(stop)]
        whole = complete(client, **GREEDY, stop=[stop, "never there"])["choices"][0]
        assert (whole["text"], whole["finish_reason"]) == (expected, "stop")
        chunks = list(events(client, COMPLETIONS, {"prompt": PROMPT, "stop": stop} | GREEDY))
        assert "".join(c["choices"][0]["text"] for c in chunks) == expected
        kept = complete(client, **GREEDY, stop=stop, no_stop_trim=True)["choices"][0]["text"]
        assert kept.startswith(expected + stop)
    assert tried >= 3


def test_stop_token_ids(client: httpx.Client) -> None:
    ids = generate(client, temperature=0, max_new_tokens=TOKENS, ignore_eos=True)["output_ids"]
    stop = ids[10]
    result = generate(client, temperature=0, max_new_tokens=TOKENS, ignore_eos=True, stop_token_ids=[stop])
    assert result["output_ids"] == ids[: ids.index(stop) + 1]
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_penalties_biases_and_min_tokens(client: httpx.Client) -> None:
    """By every endpoint's names; null is the default, and what asks for nothing changes nothing."""
    common = {"temperature": 0, "ignore_eos": True}
    nothing = {"frequency_penalty": 0, "presence_penalty": None, "repetition_penalty": 1, "logit_bias": {}}
    forced = {"logit_bias": {"97": 100}}  # the letter a
    body = {"model": "dummy", "prompt": "hello", "max_tokens": 12} | common
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12} | common

    def text(**fields: Any) -> str:
        answer = client.post("/v1/completions", json=body | fields).raise_for_status().json()
        return answer["choices"][0]["text"]

    assert text(**nothing) == text()
    assert text(**forced) == "a" * 12
    stopped = {"ignore_eos": False, "stop_token_ids": [97]}
    assert text(**forced, **stopped) == ""
    assert text(**forced, **stopped, min_tokens=12) != "a" * 12
    repeated = {"logit_bias": {"97": 20}}
    letters = text(**repeated, presence_penalty=2, frequency_penalty=2).count("a")
    assert 0 < letters < text(**repeated).count("a")
    answer = client.post("/v1/chat/completions", json=chat | forced).raise_for_status().json()
    assert answer["choices"][0]["message"]["content"] == "a" * 12
    native = {"max_new_tokens": 12, "min_new_tokens": 3, "stop_token_ids": [97]} | common | forced
    answer = client.post("/generate", json={"text": "hello", "sampling_params": native}).json()
    assert answer["meta_info"]["completion_tokens"] == 4


def test_seeds(client: httpx.Client) -> None:
    """The same seed gives the same tokens; choices of one request and other seeds differ."""
    first, again = (complete(client, **SAMPLED, n=2)["choices"] for _ in range(2))
    assert [c["text"] for c in first] == [c["text"] for c in again]
    assert first[0]["text"] != first[1]["text"]
    assert complete(client, **SAMPLED | {"seed": 8})["choices"][0]["text"] == first[1]["text"]
    unseeded = {**SAMPLED, "seed": None}
    texts = {complete(client, **unseeded)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) > 1


def test_completion_logprobs(client: httpx.Client) -> None:
    choice = complete(client, **GREEDY, logprobs=3)["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(logprobs[key]) for key in logprobs} == {TOKENS}
    assert all(p <= 0 for p in logprobs["token_logprobs"])
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]):
        # Greedy: the token is the most likely one. Bytes that are no text share one spelling.
        assert 1 <= len(top) <= 3 and ("\ufffd" in top or abs(top[token] - value) < 1e-5)
        assert value >= max(top.values()) - 1e-5
    chunks = list(events(client, COMPLETIONS, {"prompt": PROMPT, "logprobs": 3} | GREEDY))
    streamed = [c["choices"][0]["logprobs"] for c in chunks]
    for key in ("tokens", "text_offset"):
        assert sum((s[key] for s in streamed), []) == logprobs[key]  # noqa: RUF017
    values = [p for s in streamed for p in s["token_logprobs"]]
    assert values == pytest.approx(logprobs["token_logprobs"], abs=1e-4)


def test_chat_logprobs(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "logprobs": True, "top_logprobs": 2} | GREEDY
    content = client.post(CHAT, json=body).raise_for_status().json()["choices"][0]["logprobs"]["content"]
    assert len(content) == TOKENS
    assert all(len(e["top_logprobs"]) == 2 and e["bytes"] == list(e["token"].encode()) for e in content)


def test_native_logprobs(client: httpx.Client) -> None:
    body = {
        "text": PROMPT,
        "sampling_params": {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
    }
    result = client.post(GENERATE, json=body).raise_for_status().json()
    meta = result["meta_info"]
    prompt, output = meta["input_token_logprobs"], meta["output_token_logprobs"]
    assert [t for _, t, _ in prompt] in (list(PROMPT.encode()), list(PROMPT.encode())[1:])
    assert "".join(text for _, _, text in prompt) in (PROMPT, PROMPT[1:])
    assert [t for _, t, _ in output] == result["output_ids"]
    assert all(value <= 0 for value, _, _ in prompt + output if value is not None)
    assert all(len(top) == 2 for top in meta["output_top_logprobs"])
    # What was generated has the same logprobs when it is a prompt.
    ids = list(PROMPT.encode()) + result["output_ids"]
    again = {"input_ids": ids, "return_logprob": True, "logprob_start_len": len(PROMPT)}
    scored = client.post(GENERATE, json=again | {"sampling_params": {"max_new_tokens": 1}}).json()[
        "meta_info"
    ]
    expected = [value for value, _, _ in output]
    assert [v for v, _, _ in scored["input_token_logprobs"]] == pytest.approx(expected, abs=1e-3)


def test_cached_tokens_are_reported(client: httpx.Client) -> None:
    text = "a prefix that was seen before, " * 8
    generate(client, text, max_new_tokens=1)
    assert generate(client, text + "and more", max_new_tokens=1)["meta_info"]["cached_tokens"] >= 128
    usage = complete(client, prompt=text + "or less", max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 128


LONG = {"text": "x", "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True, "temperature": 0}}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_disconnect_frees_the_request(server: RunningServer, stream: bool) -> None:
    server.wait_state(num_running_reqs=0, num_waiting_reqs=0)
    with server.client() as client:
        if stream:
            with client.stream("POST", GENERATE, json=LONG | {"stream": True}) as response:
                lines = response.iter_lines()  # kept: its end would be the response's
                next(lines)
                assert server.internal_state()["num_running_reqs"] == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(GENERATE, json=LONG, timeout=0.3)
    start = time.monotonic()
    state = server.wait_state(num_running_reqs=0, num_waiting_reqs=0, leak=None)
    assert time.monotonic() - start < 2  # it would run for much longer
    assert state["available_pages"] + state["evictable_pages"] == state["total_pages"]


def test_abort_request(server: RunningServer) -> None:
    results: list[dict[str, Any]] = []

    def run() -> None:
        with server.client() as client:
            results.append(client.post(GENERATE, json=LONG | {"rid": "doomed"}).json())

    thread = threading.Thread(target=run)
    thread.start()
    server.wait_state(num_running_reqs=1)
    with server.client() as client:
        response = client.post(GENERATE, json=LONG | {"rid": "doomed"})
        assert response.status_code == 400 and "rid" in response.json()["error"]["message"]
        assert client.post("/abort_request", json={"rid": "nobody"}).json() == {"aborted": 0}
        assert client.post("/abort_request", json={"rid": "doomed"}).json() == {"aborted": 1}
    thread.join(10)
    assert results[0]["meta_info"]["finish_reason"]["type"] == "abort"
    server.wait_state(num_running_reqs=0, leak=None)


def test_models_and_info(client: httpx.Client) -> None:
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["max_model_len"]) == ("dummy", 2048)
    assert client.get("/v1/models/dummy").json() == card
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/get_model_info").json()["is_generation"] is True
    info = client.get("/get_server_info").json()
    assert info["speculative_num_steps"] == 3 and info["max_total_num_tokens"] == 16384
    state = info["internal_states"][0]
    assert {"enabled", "layout", "copy", "draft_backends", "replays", "fallbacks"} <= set(
        state["nsa_metadata"]
    )
    assert state["nsa_metadata"]["enabled"] is True and state["nsa_metadata"]["draft_backends"] == 2
    assert state["nsa_metadata"]["replays"] > 0
    assert state["avg_spec_accept_length"] >= 1


def test_flush_cache(server: RunningServer) -> None:
    server.wait_state(num_running_reqs=0, num_waiting_reqs=0)
    with server.client() as client:
        generate(client, "y" * 200, max_new_tokens=1)
        assert server.internal_state()["evictable_pages"] >= 3
        assert client.post("/flush_cache").status_code == 200
        state = server.internal_state()
        assert state["available_pages"] == state["total_pages"]
        with client.stream("POST", GENERATE, json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            with server.client() as other:
                assert other.get("/flush_cache").status_code == 400  # a request is running
