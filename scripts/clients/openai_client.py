"""The `openai` package against a server: python openai_client.py http://127.0.0.1:30000"""

from __future__ import annotations

import asyncio
import sys

import openai

PROMPT = "import os\n\ndef "
GREEDY = {"model": "tiny-nsa", "temperature": 0, "max_tokens": 16}
MESSAGES = [{"role": "user", "content": "hi"}]
USAGE = {"include_usage": True}


def main(url: str) -> None:
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny-nsa"]
    whole = client.completions.create(prompt=PROMPT, **GREEDY)
    stream = client.completions.create(prompt=PROMPT, stream=True, stream_options=USAGE, **GREEDY)
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
    assert last.usage.total_tokens == whole.usage.total_tokens
    scored = client.completions.create(prompt=PROMPT, echo=True, logprobs=2, **GREEDY | {"max_tokens": 0})
    assert scored.choices[0].text == PROMPT and scored.choices[0].logprobs.token_logprobs[0] is None
    assert len(scored.choices[0].logprobs.tokens) == whole.usage.prompt_tokens

    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, n=2, **GREEDY)
    assert len(chat.choices) == 2 and chat.choices[0].message.content == chat.choices[1].message.content
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens // 2
    turns = [*MESSAGES, chat.choices[0].message, {"role": "user", "content": "more"}]
    client.chat.completions.create(messages=turns, **GREEDY)

    async def one(api: openai.AsyncOpenAI) -> str:
        chunks = await api.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as api:
            return await asyncio.gather(*(one(api) for _ in range(8)))

    assert set(asyncio.run(several())) == {chat.choices[0].message.content}
    print("equal texts whole, streamed and 8 at a time")


if __name__ == "__main__":
    main(sys.argv[1])
