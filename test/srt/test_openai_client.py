"""The public `openai` client against the server: what users will run."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from server_fixture import RunningServer

MESSAGES = [{"role": "user", "content": "Say something."}]
GREEDY = {"model": "dummy", "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def api(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_models(api: openai.OpenAI) -> None:
    assert [m.id for m in api.models.list()] == ["dummy"]
    assert api.models.retrieve("dummy").owned_by == "sglang"


def test_completion_and_stream(api: openai.OpenAI) -> None:
    whole = api.completions.create(prompt="Once", **GREEDY)
    stream = list(api.completions.create(prompt="Once", stream=True, **GREEDY))
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 24
    assert "".join(c.choices[0].text for c in stream) == whole.choices[0].text


def test_chat_and_stream(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(messages=MESSAGES, **GREEDY)
    options = {"include_usage": True}
    stream = list(
        api.chat.completions.create(messages=MESSAGES, stream=True, stream_options=options, **GREEDY)
    )
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert text == whole.choices[0].message.content != ""
    assert stream[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.choices[0].message.role == "assistant"


def test_choices_logprobs_and_stop(api: openai.OpenAI) -> None:
    sampled = {**GREEDY, "temperature": 1.0, "seed": 3}
    answer = api.chat.completions.create(messages=MESSAGES, n=3, logprobs=True, top_logprobs=2, **sampled)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert len(choice.logprobs.content) == 24 and len(choice.logprobs.content[0].top_logprobs) == 2
    text = next(c.message.content for c in answer.choices)
    stop = next(c for c in text if c != "\ufffd")
    stopped = api.chat.completions.create(messages=MESSAGES, stop=[stop], **sampled)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == text[: text.find(stop)]


def test_errors_are_the_clients_errors(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-17"):
        api.models.retrieve("gpt-17")
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        api.chat.completions.create(model="dummy", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="tools"):
        api.chat.completions.create(
            model="dummy", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )


async def _stream_text(api: openai.AsyncOpenAI) -> str:
    stream = await api.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
    return "".join([c.choices[0].delta.content or "" async for c in stream])


def test_async_clients_together(server: RunningServer) -> None:
    import asyncio

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused") as api:
            return await asyncio.gather(*(_stream_text(api) for _ in range(8)))

    assert len(set(asyncio.run(run()))) == 1
