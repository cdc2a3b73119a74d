"""`litellm` against a server: python litellm_client.py http://127.0.0.1:30000"""

from __future__ import annotations

import sys

import litellm

GREEDY = {"temperature": 0, "max_tokens": 16, "api_key": "none", "num_retries": 0}
MESSAGES = [{"role": "user", "content": "hi"}]


def main(url: str) -> None:
    options = GREEDY | {"api_base": url + "/v1"}
    text = {"model": "text-completion-openai/tiny-nsa", "prompt": "import os\n\ndef "} | options
    whole = litellm.text_completion(**text)
    stream = litellm.text_completion(stream=True, **text)
    assert "".join(c.choices[0].text or "" for c in stream) == whole.choices[0].text != ""
    answers = set()
    for provider in ("openai", "hosted_vllm"):
        chat = {"model": f"{provider}/tiny-nsa", "messages": MESSAGES} | options
        answers.add(litellm.completion(**chat).choices[0].message.content)
        chunks = litellm.completion(stream=True, stream_options={"include_usage": True}, **chat)
        answers.add("".join(c.choices[0].delta.content or "" for c in chunks))
    assert len(answers) == 1 and "" not in answers
    print("equal texts whole and streamed")


if __name__ == "__main__":
    main(sys.argv[1])
