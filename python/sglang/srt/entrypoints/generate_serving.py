"""POST /generate: SGLang's native form, in its shapes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from sglang.srt.entrypoints.choice import Choice
from sglang.srt.entrypoints.generate_batch import items
from sglang.srt.entrypoints.generate_protocol import GenerateReqInput
from sglang.srt.entrypoints.serving import EventStream, answer, check_logprobs, pack_json, until_disconnect
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams

# SamplingParams' names -> the client's
NAMES = {name: f"sampling_params.{name}" for name in (*SamplingParams.__struct_fields__, "n")}


async def serve_generate(manager: TokenizerManager, body: GenerateReqInput, request: Request) -> Response:
    choices = await until_disconnect(request, _choices(manager, body))
    for choice in choices:
        choice.token_text = manager.token_text if body.return_text_in_logprobs else None
    names = [choice.names for choice in choices]
    generation = await manager.generate([choice.request for choice in choices], names)
    single = len(choices) == 1 and not body.is_batch

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        begun: set[int] = set()  # choices whose prompt logprobs were told
        async for event in generation:
            choice = choices[event.index]
            choice.pack = pack_json
            choice.add(event.output, event.text, event.text_offsets)
            if event.output.output_ids or event.output.finish_reason:
                described = choice.native(event.index not in begun)
                begun.add(event.index)
                yield described if single else described | {"index": event.index}

    def whole() -> Any:
        answers = [choice.native() for choice in choices]
        return answers[0] if single else answers

    if body.stream:
        return EventStream(generation, chunks())
    return await answer(request, manager, generation, choices, whole)


async def _choices(manager: TokenizerManager, body: GenerateReqInput) -> list[Choice]:
    """One for each prompt and choice. Raises RequestError (400)."""
    param, batch = body.prompt_name, items(body)
    prompts = await manager.encode([item.prompt for item in batch], param)
    names, choices = NAMES | {"input_ids": param}, []
    for item, ids in zip(batch, prompts, strict=True):
        has_limit = item.sampling.max_new_tokens is not None
        params = manager.check(len(ids), item.params, has_limit, names)
        choices += [item.choice(number, ids, params) for number in range(item.n)]
    check_logprobs([choice.request for choice in choices], names)
    return choices
