"""POST /generate: SGLang's native form, in its shapes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from sglang.srt.entrypoints.choice import Choice
from sglang.srt.entrypoints.generate_batch import items
from sglang.srt.entrypoints.generate_protocol import GenerateReqInput
from sglang.srt.entrypoints.serving import EventStream, answer, check_prompt, collect
from sglang.srt.managers.tokenizer_manager import TokenizerManager


async def serve_generate(manager: TokenizerManager, body: GenerateReqInput, request: Request) -> Response:
    choices = await _choices(manager, body)
    whole_rid = [body.rid] if isinstance(body.rid, str) else []
    names = [[choice.rid, *whole_rid] for choice in choices]
    generation = await manager.generate([choice.request for choice in choices], names)
    single = len(choices) == 1 and not body.is_batch

    token_text = manager.tokenizer.decode if body.return_text_in_logprobs else None

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        async for event in generation:
            choices[event.index].add(event.output, event.text, event.text_offsets)
            described = choices[event.index].native(token_text)
            yield described if single else described | {"index": event.index}

    async def whole() -> Any:
        await collect(generation, choices)
        answers = [choice.native(token_text) for choice in choices]
        return answers[0] if single else answers

    if body.stream:
        return EventStream(generation, chunks())
    return await answer(request, generation, whole)


async def _choices(manager: TokenizerManager, body: GenerateReqInput) -> list[Choice]:
    """One for each prompt and choice. Raises RequestError (400)."""
    choices = []
    for item in items(body):
        ids, limit = item.prompt, item.sampling.max_new_tokens
        for number in range(item.sampling.n or 1):
            params = item.sampling.sampling_params(limit, number)
            # Tokenized for the first choice, the same tokens for the others.
            names = {"input_ids": body.prompt_name}
            ids, checked = await check_prompt(manager, ids, params, limit is not None, names)
            choices.append(item.choice(number, ids, checked))
    return choices
