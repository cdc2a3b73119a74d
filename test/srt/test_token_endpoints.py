"""SGLang's smaller endpoints: tokens to text and back, scores, newer names of the server's state, health."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from server_fixture import RunningServer

TEXTS = ["hello", "", "grüße \u2603", "two\nlines"]


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    return client.post(path, json=body).raise_for_status().json()


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_there_and_back(client: httpx.Client, prefix: str) -> None:
    several = post(client, prefix + "/tokenize", prompt=TEXTS)
    assert several["count"] == [len(text.encode()) for text in TEXTS] and several["max_model_len"] == 2048
    assert post(client, prefix + "/detokenize", tokens=several["tokens"])["text"] == TEXTS
    one = post(client, prefix + "/tokenize", prompt=TEXTS[2], model="dummy", add_special_tokens=False)
    assert (one["tokens"], one["count"]) == (several["tokens"][2], several["count"][2])
    assert post(client, prefix + "/detokenize", tokens=one["tokens"])["text"] == TEXTS[2]
    assert post(client, prefix + "/detokenize", tokens=[])["text"] == ""


def test_tokens_of_a_conversation_are_those_of_its_completion(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokens = post(client, "/tokenize", messages=messages)["tokens"]
    chat = post(client, "/v1/chat/completions", messages=messages, max_tokens=1)
    assert len(tokens) == chat["usage"]["prompt_tokens"] == 5
    shown = post(client, "/detokenize", tokens=tokens, skip_special_tokens=False)["text"]
    assert shown != post(client, "/detokenize", tokens=tokens)["text"] == "hi"


def next_token_probabilities(client: httpx.Client, prompt: list[int]) -> dict[int, float]:
    """Of the most likely ones, as /generate tells them."""
    sampling = {"max_new_tokens": 1, "temperature": 0}
    body = {"input_ids": prompt, "return_logprob": True, "top_logprobs_num": 20, "sampling_params": sampling}
    (top,) = post(client, "/generate", **body)["meta_info"]["output_top_logprobs"]
    return {token: math.exp(logprob) for logprob, token, _ in top}


@pytest.mark.parametrize("item_first", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_scores_are_the_models_probabilities(client: httpx.Client, item_first: bool, as_ids: bool) -> None:
    query, items = "is it? ", ["yes it is", "no"]
    joined = [item + query if item_first else query + item for item in items]
    known = [next_token_probabilities(client, list(text.encode())) for text in joined]
    labels = list(known[0])[:3]
    body: dict[str, Any] = {"query": query, "items": items}
    if as_ids:
        body = {"query": list(query.encode()), "items": [list(item.encode()) for item in items]}
    answer = post(client, "/v1/score", **body, label_token_ids=labels, item_first=item_first)
    assert answer["object"] == "scoring" and answer["usage"]["prompt_tokens"] == sum(map(len, joined))
    assert answer["scores"][0] == pytest.approx([known[0][label] for label in labels], rel=1e-3)
    assert len(answer["scores"]) == 2 and all(0 < p < 1 for row in answer["scores"] for p in row)
    shared = [label for label in labels if label in known[1]]
    for label in shared:
        assert answer["scores"][1][labels.index(label)] == pytest.approx(known[1][label], rel=1e-3)
    body |= {"label_token_ids": labels, "item_first": item_first}
    softened = post(client, "/v1/score", **body, apply_softmax=True)["scores"]
    for row, plain in zip(softened, answer["scores"]):
        assert row == pytest.approx([p / sum(plain) for p in plain], rel=1e-3)


def test_scores_that_are_aborted(server: RunningServer) -> None:
    """Bug: an internal error, with a traceback and a closed connection."""
    body = {"query": [5] * 1500, "items": [[i] for i in range(40)], "label_token_ids": [1, 2]}
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/score", json=body)
        while not client.post("/abort_request", json={"abort_all": True}).json()["aborted"]:
            assert not answer.done(), answer.result().text
    assert (answer.result().status_code, answer.result().json()["error"]["message"]) == (
        503,
        "the scoring was aborted",
    )


def test_score_of_one_item_and_of_none(client: httpx.Client) -> None:
    labels = {"query": "a", "label_token_ids": [5, 6]}
    assert len(post(client, "/v1/score", items="b", **labels)["scores"]) == 1
    assert post(client, "/v1/score", items=[], **labels)["scores"] == []


REFUSED = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"prompt": "x" * (1 << 21)}, "prompt"),
    ("/detokenize", {"tokens": [320]}, "320"),
    ("/detokenize", {"tokens": [[1], [-1]]}, "-1"),
    ("/detokenize", {"tokens": "text"}, "tokens"),
    ("/v1/score", {"query": "a", "items": ["b"]}, "label_token_ids"),
    ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": []}, "label_token_ids"),
    ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [320]}, "320"),
    ("/v1/score", {"query": "a", "items": [[1]], "label_token_ids": [5]}, "items"),
    ("/v1/score", {"query": [], "items": [[]], "label_token_ids": [5]}, "items"),
    ("/v1/score", {"query": "a", "items": ["b"] * 3000, "label_token_ids": [5, 6]}, "items"),
    ("/v1/score", {"query": "a" * 2048, "items": ["b"], "label_token_ids": [5]}, "items"),
    (
        "/v1/score",
        {"query": "a", "items": "b", "label_token_ids": [5], "item_embed_overrides": [1]},
        "item_e",
    ),
]


@pytest.mark.parametrize("path,body,named", REFUSED, ids=lambda v: str(v)[:40])
def test_refused(client: httpx.Client, path: str, body: dict[str, Any], named: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400 and named in response.json()["error"]["message"], response.text


def test_newer_names(client: httpx.Client) -> None:
    info = client.get("/server_info").raise_for_status().json()
    assert info.keys() == client.get("/get_server_info").json().keys()
    assert info["tp_size"] == 1 and info["internal_states"][0]["num_waiting_reqs"] == 0
    model = client.get("/model_info").raise_for_status().json()
    assert model == client.get("/get_model_info").json() and model["weight_version"] == "default"
    assert client.get("/health_generate").status_code == 200
