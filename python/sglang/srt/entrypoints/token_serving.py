"""POST /tokenize, /detokenize and /v1/score, in SGLang's shapes."""

from __future__ import annotations

import math
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from sglang.srt.entrypoints.chat_template import chat_prompt
from sglang.srt.entrypoints.choice import Choice
from sglang.srt.entrypoints.serving import answer, check_batch, until_disconnect
from sglang.srt.entrypoints.token_protocol import (
    MAX_CHARS,
    DetokenizeRequest,
    ScoringRequest,
    TokenizeRequest,
)
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, new_rid
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams

NO_TOKENS = SamplingParams(max_new_tokens=0)


async def tokenize(manager: TokenizerManager, body: TokenizeRequest) -> dict[str, Any]:
    """The tokens of a text, of each of several, or of a conversation as the model would see it.

    Raises RequestError (400) where they are too long together.
    """
    if body.messages is not None:
        text, special = await manager.in_thread(lambda: chat_prompt(manager.tokenizer, body.messages)), False
    else:
        text, special = body.prompt, body.add_special_tokens is not False
    texts = [text] if isinstance(text, str) else text
    if (size := sum(map(len, texts))) > MAX_CHARS:
        param = "prompt" if body.messages is None else "messages"
        raise RequestError.bad(f"{param} has {size} characters: at most {MAX_CHARS} in one request", param)
    lists = await manager.tokenize(texts, special)
    tokens: Any = lists[0] if isinstance(text, str) else lists
    count: Any = len(tokens) if isinstance(text, str) else [len(one) for one in tokens]
    return {"tokens": tokens, "count": count, "max_model_len": manager.context_length}


async def detokenize(manager: TokenizerManager, body: DetokenizeRequest) -> dict[str, Any]:
    """Raises RequestError (400) for a token that the model does not have."""
    several = body.tokens if any(isinstance(one, list) for one in body.tokens) else [body.tokens]
    wrong = next((t for tokens in several for t in tokens if not 0 <= t < manager.vocab_size), None)
    if wrong is not None:
        message = f"tokens holds token {wrong}, which is not in [0, {manager.vocab_size})"
        raise RequestError.bad(message, "tokens")
    options = {"skip_special_tokens": body.skip_special_tokens is not False}

    def decode() -> list[str]:
        return [manager.tokenizer.decode(tokens, **options) for tokens in several]

    texts = await manager.in_thread(decode)
    return {"text": texts if several is body.tokens else texts[0]}


async def score(
    manager: TokenizerManager, body: ScoringRequest, model_name: str, request: Request
) -> Response:
    """The probability of each label after each prompt; with softmax, among the labels alone.

    A label's is the logprob of its token as the last of a prompt: a sequence for each item and label.
    """
    labels = body.label_token_ids
    wrong = next((t for t in labels if not 0 <= t < manager.vocab_size), None)
    if wrong is not None:
        message = f"label_token_ids holds token {wrong}, which is not in [0, {manager.vocab_size})"
        raise RequestError.bad(message, "label_token_ids")
    check_batch(len(body.several), len(labels), "items")
    prompts = body.prompts()
    encoded = await until_disconnect(request, manager.encode(prompts, "items")) if prompts else []
    lengths = [len(ids) for ids in encoded]
    choices: list[Choice] = []
    for ids in encoded:
        params = manager.check(len(ids) + 1, NO_TOKENS, True, {"input_ids": "items"})
        for label in labels:
            sequence = TokenizedGenerateReqInput(
                rid=new_rid(),
                input_ids=[*ids, label],
                sampling_params=params,
                return_logprob=True,
                logprob_start_len=len(ids),
            )
            choices.append(Choice(sequence, sequence.rid))

    def described(logprobs: list[float]) -> dict[str, Any]:
        rows = [logprobs[i : i + len(labels)] for i in range(0, len(logprobs), len(labels))]
        usage = {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths), "completion_tokens": 0}
        scores = [_softmax(row) if body.apply_softmax else [math.exp(p) for p in row] for row in rows]
        return {"object": "scoring", "model": model_name, "scores": scores, "usage": usage}

    if not choices:
        return JSONResponse(described([]))
    generation = await manager.generate([c.request for c in choices], [[c.rid] for c in choices])

    def whole() -> dict[str, Any]:
        if not all(choice.input_logprobs for choice in choices):
            raise RequestError(503, "the scoring was aborted")
        return described([choice.input_logprobs[-1].logprob for choice in choices])

    return await answer(request, manager, generation, choices, whole)


def _softmax(logprobs: list[float]) -> list[float]:
    highest = max(logprobs)
    weights = [math.exp(p - highest) for p in logprobs]
    return [weight / sum(weights) for weight in weights]
