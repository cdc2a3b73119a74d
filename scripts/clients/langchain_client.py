"""`langchain-openai` against a server: python langchain_client.py http://127.0.0.1:30000"""

from __future__ import annotations

import asyncio
import sys

from langchain_openai import ChatOpenAI, OpenAI

PROMPTS = ["import ", "def f("]


def main(url: str) -> None:
    options = {"model": "tiny-nsa", "base_url": url + "/v1", "api_key": "none", "temperature": 0}
    options |= {"max_tokens": 16, "max_retries": 0}
    llm = OpenAI(**options)
    alone = [llm.invoke(prompt) for prompt in PROMPTS]
    assert llm.batch(PROMPTS) == alone and "".join(llm.stream(PROMPTS[0])) == alone[0] != ""
    chat = ChatOpenAI(**options)
    answer = chat.invoke([("system", "You complete code."), ("human", "hi")])
    assert answer.content and answer.usage_metadata["output_tokens"] == 16
    assert "".join(c.content for c in chat.stream("hi")) == chat.invoke("hi").content
    assert asyncio.run(chat.ainvoke([("human", "hi"), answer, ("human", "more")])).content
    print("equal texts alone, in a batch and streamed")


if __name__ == "__main__":
    main(sys.argv[1])
