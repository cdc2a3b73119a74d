"""Fields of OpenAI's and SGLang's requests: what asks for nothing is taken, the rest is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sglang.srt.entrypoints.generate_protocol import GenerateReqInput
from sglang.srt.entrypoints.no_effect import NOTHING, AnyValue, asks_for_nothing
from sglang.srt.entrypoints.openai_protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.entrypoints.request_body import Body, parse_body
from sglang.srt.errors import RequestError

REQUESTS: list[tuple[type[Body], dict[str, Any]]] = [
    (GenerateReqInput, {"text": "x"}),
    (CompletionRequest, {"prompt": "x"}),
    (ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}]}),
]
FIELDS = [(kind, body, name) for kind, body in REQUESTS for name in kind.no_effect]
A_WISH = {"type": "something"}  # none of the parameters takes it for nothing


def parse(kind: type[Body], body: dict[str, Any]) -> Body:
    return parse_body(kind, json.dumps(body).encode())


@pytest.mark.parametrize("kind,body,name", FIELDS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_wish_is_refused_by_name_and_nothing_is_not(
    kind: type[Body], body: dict[str, Any], name: str
) -> None:
    """Bug: `return_routed_experts: false`, which SGLang's bench_serving always sends, was refused."""
    values = kind.no_effect[name]
    for value in [*NOTHING, *(values or ()), [None, None]]:
        assert parse(kind, body | {name: value}) == parse(kind, body)
    if values is not AnyValue:
        with pytest.raises(RequestError, match=f"^{name}=") as error:
            parse(kind, body | {name: A_WISH})
        assert (error.value.status, error.value.param) == (400, name)


@pytest.mark.parametrize(
    "value,values,expected",
    [
        (0, (), False),
        (0.0, (0,), True),
        (True, (1,), False),
        (1, (1,), True),
        ([0, 0], (0,), True),
        ([0, 2], (0,), False),
        (["text"], ("text",), True),
        (["text", "audio"], ("text",), False),
        ({"type": "text"}, ({"type": "text"},), True),
        (A_WISH, AnyValue, True),
    ],
)
def test_asks_for_nothing(value: Any, values: tuple[Any, ...] | None, expected: bool) -> None:
    assert asks_for_nothing(value, values) is expected


# What clients send with every request, whatever their user asked for.
BODIES_OF_CLIENTS = {
    "bench_serving --backend sglang": (
        GenerateReqInput,
        {
            "text": "x",
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
            "stream": True,
            "lora_path": None,
            "return_logprob": False,
            "return_routed_experts": False,
            "logprob_start_len": -1,
        },
    ),
    "a null for every native member": (
        GenerateReqInput,
        {"text": "x"} | {name: None for name in GenerateReqInput.model_fields if name != "text"},
    ),
    "a null for every member of a completion": (
        CompletionRequest,
        dict.fromkeys(CompletionRequest.model_fields) | {"prompt": "x"},
    ),
    "a null for every member of a chat": (
        ChatCompletionRequest,
        dict.fromkeys(ChatCompletionRequest.model_fields) | {"messages": [{"role": "user", "content": "x"}]},
    ),
    "what SGLang's requests have beside OpenAI's": (
        CompletionRequest,
        {"prompt": "x", "rid": None, "cache_salt": None, "priority": None, "routed_dp_rank": None},
    ),
    "an answer sent back": (
        ChatCompletionRequest,
        {
            "messages": [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "content": "y",
                    "refusal": None,
                    "annotations": [],
                    "audio": None,
                    "function_call": None,
                    "tool_calls": None,
                },
                {"role": "user", "content": "z"},
            ],
            "max_tokens": 4,
            "max_completion_tokens": 4,
        },
    ),
}


@pytest.mark.parametrize("client", BODIES_OF_CLIENTS)
def test_bodies_of_clients_are_taken(client: str) -> None:
    kind, body = BODIES_OF_CLIENTS[client]
    parse(kind, body)
