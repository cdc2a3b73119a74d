"""POST /generate: SGLang's native form, in its shapes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from sglang.srt.entrypoints.choice import Choice
from sglang.srt.entrypoints.generate_protocol import GenerateReqInput, GenerateSamplingParams
from sglang.srt.entrypoints.serving import (
    EventStream,
    LogprobOptions,
    answer,
    check_batch,
    check_prompt,
    collect,
)
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, new_rid
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.token_logprob import MAX_TOP_LOGPROBS

T = TypeVar("T")


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


@dataclass(frozen=True)
class Item:
    """One prompt of a batch with what belongs to it."""

    prompt: str | list[int]
    sampling: GenerateSamplingParams
    rid: str
    logprobs: LogprobOptions


def _items(body: GenerateReqInput, param: str) -> list[Item]:
    """A value that is given once goes to every prompt. Raises RequestError (400)."""
    prompts = body.prompts
    count = len(prompts)
    if not prompts:
        raise RequestError.bad(f"{param} must hold at least one prompt", param)
    params = _per_prompt(body.sampling_params or GenerateSamplingParams(), count, "sampling_params")
    check_batch(sum(p.n or 1 for p in params), 1, param)
    rids = _per_prompt(new_rid() if body.rid is None else body.rid, count, "rid")
    if not isinstance(body.rid, list) and count > 1:
        rids = [f"{rid}_{i}" for i, rid in enumerate(rids)]
    if len(set(rids)) < count:
        raise RequestError.bad("rid must not hold the same rid twice", "rid")
    flags = _per_prompt(body.return_logprob or False, count, "return_logprob")
    start = -1 if body.logprob_start_len is None else body.logprob_start_len
    starts = _per_prompt(start, count, "logprob_start_len")
    tops = _per_prompt(body.top_logprobs_num or 0, count, "top_logprobs_num")
    options = map(_logprob_options, flags, starts, tops)
    return [Item(*values) for values in zip(prompts, params, rids, options)]


async def _choices(manager: TokenizerManager, body: GenerateReqInput) -> list[Choice]:
    """One for each prompt and choice. Raises RequestError (400)."""
    param = "text" if body.text is not None else "input_ids"
    choices = []
    for item in _items(body, param):
        ids, limit = item.prompt, item.sampling.max_new_tokens
        for choice in range(item.sampling.n or 1):
            params = item.sampling.sampling_params(limit, choice)
            # Tokenized for the first choice, the same tokens for the others.
            ids, checked = await check_prompt(manager, ids, params, limit is not None, {"input_ids": param})
            start = item.logprobs.logprob_start_len
            if start >= len(ids):
                message = f"logprob_start_len {start} is not in [-1, {len(ids)}), the prompt's length"
                raise RequestError.bad(message, "logprob_start_len")
            sequence = TokenizedGenerateReqInput(
                rid=new_rid(),
                input_ids=ids,
                sampling_params=checked,
                stream=bool(body.stream),
                return_token_sources=bool(body.return_token_sources),
                **asdict(item.logprobs),
            )
            choices.append(Choice(sequence, item.rid + (f"_n{choice}" if choice else "")))
    return choices


def _per_prompt(value: T | list[T], count: int, name: str) -> list[T]:
    """One value for each prompt."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError.bad(f"{name} has {len(value)} values for {count} prompts", name)
    return value


def _logprob_options(flag: bool, start: int, top: int) -> LogprobOptions:
    if start < -1:
        raise RequestError.bad(f"logprob_start_len must be at least -1, got {start}", "logprob_start_len")
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        message = f"top_logprobs_num must be in [0, {MAX_TOP_LOGPROBS}], got {top}"
        raise RequestError.bad(message, "top_logprobs_num")
    return LogprobOptions(flag, start if flag else -1, top if flag else 0)
