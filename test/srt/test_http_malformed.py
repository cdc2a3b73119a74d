"""Malformed requests: each gets its 4xx with a message that names what is wrong, and the server goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
MESSAGES = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Bad:
    """A request and the word that the message must hold. A dict is merged into a request that is right."""

    path: str
    body: dict[str, Any] | str | bytes
    named: str
    status: int = 400

    @property
    def content(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        if isinstance(self.body, str):
            return self.body.encode()
        good = {COMPLETIONS: {"prompt": "hi"}, CHAT: {"messages": MESSAGES}, GENERATE: {"text": "hi"}}
        merged = good.get(self.path, {}) | self.body
        return json.dumps({k: v for k, v in merged.items() if v is not ...}).encode()

    def __str__(self) -> str:
        return f"{self.path} {self.body!r}"[:80].encode("ascii", "replace").decode()


def sampling(**values: Any) -> dict[str, Any]:
    return {"sampling_params": values}


CASES = [
    # not JSON, not an object, not there
    Bad(COMPLETIONS, "", "JSON"),
    Bad(COMPLETIONS, "{", "JSON"),
    Bad(COMPLETIONS, "{'prompt': 'hi'}", "JSON"),
    Bad(CHAT, b"\xff\xfe{}", "JSON"),
    Bad(GENERATE, '{"text": "\\ud800"}', "JSON"),
    Bad(GENERATE, '{"text": ' + "[" * 5000 + "]" * 5000 + "}", "JSON"),
    Bad(COMPLETIONS, "[]", "body"),
    Bad(COMPLETIONS, "null", "body"),
    Bad(GENERATE, '"text"', "body"),
    Bad(COMPLETIONS, {"prompt": ...}, "prompt"),
    Bad(CHAT, {"messages": ...}, "messages"),
    Bad(GENERATE, {"text": ...}, "text"),
    # wrong types
    Bad(COMPLETIONS, {"prompt": 7}, "prompt"),
    Bad(COMPLETIONS, {"prompt": None}, "prompt"),
    Bad(COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
    Bad(COMPLETIONS, {"prompt": [1.5]}, "prompt"),
    Bad(COMPLETIONS, {"temperature": "hot"}, "temperature"),
    Bad(COMPLETIONS, {"temperature": True}, "temperature"),
    Bad(COMPLETIONS, {"max_tokens": 1.5}, "max_tokens"),
    Bad(COMPLETIONS, {"max_tokens": "8"}, "max_tokens"),
    Bad(COMPLETIONS, {"stream": "yes"}, "stream"),
    Bad(COMPLETIONS, {"stop": 7}, "stop"),
    Bad(COMPLETIONS, {"stop": ["a", None]}, "stop"),
    Bad(COMPLETIONS, {"stop_token_ids": ["a"]}, "stop_token_ids"),
    Bad(COMPLETIONS, {"seed": "a"}, "seed"),
    Bad(CHAT, {"messages": "hi"}, "messages"),
    Bad(CHAT, {"messages": []}, "messages"),
    Bad(CHAT, {"messages": [{"role": "user"}]}, "content"),
    Bad(CHAT, {"messages": [{"content": "hi"}]}, "role"),
    Bad(CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}, "role"),
    Bad(CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
    Bad(CHAT, {"logprobs": 3}, "logprobs"),
    Bad(GENERATE, {"text": 7}, "text"),
    Bad(GENERATE, {"text": ..., "input_ids": "abc"}, "input_ids"),
    Bad(GENERATE, {"sampling_params": "greedy"}, "sampling_params"),
    Bad(GENERATE, {"return_logprob": "yes"}, "return_logprob"),
    # out of range
    Bad(COMPLETIONS, {"prompt": ""}, "prompt"),
    Bad(COMPLETIONS, {"prompt": []}, "prompt"),
    Bad(COMPLETIONS, {"prompt": [[]]}, "prompt"),
    Bad(COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
    Bad(COMPLETIONS, {"prompt": [-1]}, "prompt"),
    Bad(COMPLETIONS, {"prompt": [320]}, "prompt"),
    Bad(COMPLETIONS, {"prompt": [2**40]}, "prompt"),
    Bad(COMPLETIONS, {"max_tokens": -5}, "max_tokens"),
    Bad(CHAT, {"max_tokens": 0}, "max_tokens"),
    Bad(COMPLETIONS, {"temperature": -0.1}, "temperature"),
    Bad(COMPLETIONS, {"temperature": NAN}, "temperature"),
    Bad(COMPLETIONS, {"temperature": INF}, "temperature"),
    Bad(COMPLETIONS, {"top_p": 0}, "top_p"),
    Bad(COMPLETIONS, {"top_p": 1.5}, "top_p"),
    Bad(COMPLETIONS, {"top_p": NAN}, "top_p"),
    Bad(COMPLETIONS, {"top_k": 0}, "top_k"),
    Bad(COMPLETIONS, {"top_k": 2**80}, "top_k"),
    Bad(COMPLETIONS, {"min_p": -1}, "min_p"),
    Bad(COMPLETIONS, {"min_p": NAN}, "min_p"),
    Bad(COMPLETIONS, {"seed": -(2**63) - 1}, "seed"),
    Bad(COMPLETIONS, {"seed": 2**64}, "seed"),
    Bad(COMPLETIONS, {"n": 0}, "n"),
    Bad(COMPLETIONS, {"n": 1000}, "n"),
    Bad(COMPLETIONS, {"stop": ""}, "stop"),
    Bad(COMPLETIONS, {"stop": ["x"] * 17}, "stop"),
    Bad(COMPLETIONS, {"stop_token_ids": [320]}, "stop_token_ids"),
    Bad(COMPLETIONS, {"logprobs": -1}, "logprobs"),
    Bad(COMPLETIONS, {"logprobs": 21}, "logprobs"),
    Bad(CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    Bad(CHAT, {"top_logprobs": 3}, "top_logprobs"),
    Bad(CHAT, {"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
    Bad(COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
    Bad(GENERATE, sampling(max_new_tokens=-1), "max_new_tokens"),
    Bad(GENERATE, sampling(temperature=NAN), "temperature"),
    Bad(GENERATE, {"top_logprobs_num": 99}, "top_logprobs_num"),
    Bad(GENERATE, {"logprob_start_len": -2}, "logprob_start_len"),
    Bad(GENERATE, {"logprob_start_len": 2, "return_logprob": True}, "logprob_start_len"),
    Bad(GENERATE, {"text": ["a", "b"], "rid": ["same", "same"]}, "rid"),
    Bad(GENERATE, {"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    Bad(GENERATE, {"text": []}, "text"),
    Bad(GENERATE, {"text": ["a"] * 5000}, "5000"),
    Bad(COMPLETIONS, {"prompt": [[1]] * 100, "n": 128}, "prompt"),
    Bad(GENERATE, {"input_ids": [1]}, "input_ids"),
    # longer than the context of 2048: refused, not truncated
    Bad(COMPLETIONS, {"prompt": "x" * 2048}, "prompt"),
    Bad(COMPLETIONS, {"prompt": "x" * 100_000}, "prompt"),
    Bad(CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
    Bad(GENERATE, {"text": ..., "input_ids": [5] * 5000}, "input_ids"),
    Bad(COMPLETIONS, {"prompt": "x" * 2000, "max_tokens": 49}, "max_tokens"),
    Bad(CHAT, {"max_tokens": 3000}, "max_tokens"),
    Bad(GENERATE, sampling(max_new_tokens=2**31 - 1), "max_new_tokens"),
    # unknown, and known but not supported
    Bad(COMPLETIONS, {"model": "dummy:adapter"}, "adapter"),
    Bad(CHAT, {"model": "dummy:adapter"}, "adapter"),
    Bad(COMPLETIONS, {"temprature": 0.5}, "temprature"),
    Bad(COMPLETIONS, {"best_of": 2, "n": 3}, "best_of"),
    Bad(COMPLETIONS, {"suffix": "end"}, "suffix"),
    Bad(COMPLETIONS, {"best_of": 3}, "best_of"),
    Bad(COMPLETIONS, {"frequency_penalty": 2.5}, "frequency_penalty"),
    Bad(CHAT, {"presence_penalty": -2.01}, "presence_penalty"),
    Bad(CHAT, {"logit_bias": {"5": 101}}, "logit_bias"),
    Bad(CHAT, {"logit_bias": {"five": 1}}, "logit_bias"),
    Bad(COMPLETIONS, {"logit_bias": {"320": 1}}, "logit_bias"),
    Bad(COMPLETIONS, {"logit_bias": {str(i): 0 for i in range(2000)}}, "logit_bias"),
    Bad(COMPLETIONS, {"logit_bias": [1]}, "logit_bias"),
    Bad(COMPLETIONS, {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    Bad(CHAT, {"min_tokens": 5000}, "min_tokens"),
    Bad(GENERATE, sampling(min_new_tokens=-1), "min_new_tokens"),
    Bad(GENERATE, sampling(repetition_penalty=0), "repetition_penalty"),
    Bad(CHAT, {"tools": [{"type": "function"}]}, "tools"),
    Bad(CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    Bad(CHAT, {"store": True}, "store"),
    Bad(GENERATE, {"image_data": "x"}, "image_data"),
    Bad(GENERATE, sampling(regex="a+"), "regex"),
    Bad(GENERATE, sampling(beam_width=4), "beam_width"),
    Bad("/abort_request", {}, "rid"),
    Bad("/v1/embeddings", {}, "/v1/embeddings", 404),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_malformed_request_is_refused(client: httpx.Client, case: Bad) -> None:
    response = client.post(case.path, content=case.content, headers=JSON)
    assert response.status_code == case.status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert case.named in error["message"]
    assert error["type"] == ("not_found_error" if case.status == 404 else "invalid_request_error")


def test_refused_streams_have_a_status_too(client: httpx.Client) -> None:
    for path in (COMPLETIONS, CHAT, GENERATE):
        body = Bad(path, {"stream": True, "nonsense": 1}, "").content
        assert client.post(path, content=body, headers=JSON).status_code == 400


def test_wrong_method(client: httpx.Client) -> None:
    response = client.get(COMPLETIONS)
    assert response.status_code == 405 and COMPLETIONS in response.json()["error"]["message"]


def test_body_over_the_limit(client: httpx.Client) -> None:
    response = client.post(COMPLETIONS, content=b" " * (33 << 20), headers=JSON)
    assert response.status_code == 413


def test_server_still_answers(client: httpx.Client) -> None:
    """Runs after the table: all of it went to the same server."""
    body = {"model": "dummy", "prompt": "hi", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    usage = client.post(COMPLETIONS, json=body).raise_for_status().json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 4)


def test_values_without_effect_are_accepted(client: httpx.Client) -> None:
    body = {
        "messages": MESSAGES,
        "max_completion_tokens": 4,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "min_tokens": 0,
        "user": "someone",
        "store": False,
        "tools": [],
        "response_format": {"type": "text"},
        "temperature": None,
    }
    assert client.post(CHAT, json=body).status_code == 200


def test_longest_request_is_served(client: httpx.Client) -> None:
    """Exactly the context: 2047 prompt tokens and one more."""
    body = {"prompt": "x" * 2047, "max_tokens": 1}
    usage = client.post(COMPLETIONS, json=body).raise_for_status().json()["usage"]
    assert usage["total_tokens"] == 2048
    usage = client.post(COMPLETIONS, json={"prompt": "x" * 2040, "temperature": 0}).json()["usage"]
    assert usage["total_tokens"] <= 2048  # without a limit of its own it gets the room that is left
