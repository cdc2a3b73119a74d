"""POST /generate: SGLang's native form, in its shapes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from sglang.srt.entrypoints.choice import Choice
from sglang.srt.entrypoints.generate_batch import items
from sglang.srt.entrypoints.generate_protocol import GenerateReqInput
from sglang.srt.entrypoints.serving import EventStream, answer, pack_json, until_disconnect
from sglang.srt.errors import RequestError
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams

MAX_PROMPT_LOGPROBS = 1 << 20  # of one request, those of the most likely tokens included

# SamplingParams' names -> the client's
NAMES = {name: f"sampling_params.{name}" for name in SamplingParams.__struct_fields__}


async def serve_generate(manager: TokenizerManager, body: GenerateReqInput, request: Request) -> Response:
    choices = await until_disconnect(request, _choices(manager, body))
    for choice in choices:
        choice.token_text = manager.token_text if body.return_text_in_logprobs else None
    whole_rid = [body.rid] if isinstance(body.rid, str) else []
    names = [[choice.rid, *whole_rid] for choice in choices]
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
    entries = sum(item.num_prompt_logprobs(ids) for item, ids in zip(batch, prompts, strict=True))
    if entries > MAX_PROMPT_LOGPROBS:
        message = f"{entries} prompt logprobs are asked for: at most {MAX_PROMPT_LOGPROBS} in one request"
        raise RequestError.bad(message, "logprob_start_len")
    choices = []
    for item, ids in zip(batch, prompts, strict=True):
        has_limit = item.sampling.max_new_tokens is not None
        params = manager.check(len(ids), item.params, has_limit, NAMES | {"input_ids": param})
        choices += [item.choice(number, ids, params) for number in range(item.n)]
    return choices
