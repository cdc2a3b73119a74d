"""POST /v1/completions and /v1/chat/completions, in OpenAI's shapes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from fastapi import Request
from fastapi.responses import Response

from sglang.srt.entrypoints.chat_template import chat_prompt
from sglang.srt.entrypoints.choice import Choice
from sglang.srt.entrypoints.openai_protocol import ChatCompletionRequest, CompletionRequest, OpenAIRequest
from sglang.srt.entrypoints.serving import (
    EventStream,
    LogprobOptions,
    answer,
    check_batch,
    check_logprobs,
    until_disconnect,
)
from sglang.srt.errors import RequestError, shown
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, new_rid
from sglang.srt.managers.tokenizer_manager import Event, Generation, TokenizerManager
from sglang.srt.sampling.token_logprob import TokenLogprob

R = TypeVar("R", bound=OpenAIRequest)

LIMIT_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions


class OpenAIServing(ABC, Generic[R]):
    """One request of one endpoint. The subclasses say how a prompt is made and how a choice looks."""

    id_prefix: str
    object: str
    chunk_object: str
    names: dict[str, str]  # SamplingParams' names -> the client's

    def __init__(self, manager: TokenizerManager, model_names: Sequence[str], body: R) -> None:
        """`model_names` are the names of the one model that is served. As in SGLang, it answers to any other
        name too; the answer says which model gave it. Raises RequestError (400) where the name asks for an
        adapter."""
        asked = body.model or model_names[0]
        if asked not in model_names and asked.startswith(tuple(f"{name}:" for name in model_names)):
            raise RequestError.bad(f"model {shown(asked)} asks for an adapter: there are none", "model")
        self.manager, self.body, self.model_name = manager, body, model_names[0]
        self.id = body.rid or f"{self.id_prefix}-{new_rid()}"  # all of its choices have it as their rid
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self.prompts: list[list[int]] = []

    async def serve(self, request: Request) -> Response:
        requests = await until_disconnect(request, self.requests())
        self.choices = [Choice(r, self.id) for r in requests]
        generation = await self.manager.generate(requests, [[self.id]] * len(requests))
        if self.body.stream:
            return EventStream(generation, self._chunks(generation))

        def whole() -> dict[str, Any]:
            return self._envelope(
                self.object, [self.whole_choice(i, c) for i, c in enumerate(self.choices)]
            ) | {"usage": self._usage(self.prompts, self.choices)}

        return await answer(request, self.manager, generation, self.choices, whole)

    async def requests(self) -> list[TokenizedGenerateReqInput]:
        """Each sequence: n for each prompt, in order."""
        limit, n = self.max_tokens(), self.body.n or 1
        prompts = await self.manager.in_thread(self.prompt_inputs)  # templates take time
        check_batch(len(prompts), n, self.names["input_ids"])
        # Without a limit the room that is left is the limit.
        fallback = self.default_max_tokens or self.manager.context_length
        params = self.body.sampling_params(fallback if limit is None else limit)
        sequences = []
        self.prompts = await self.manager.encode(prompts, self.names["input_ids"], self.add_special_tokens)
        for ids in self.prompts:
            checked = self.manager.check(len(ids), params, limit is not None, self.names)
            sequences += [
                TokenizedGenerateReqInput(
                    rid=new_rid(),
                    input_ids=ids,
                    sampling_params=checked,
                    choice=choice,
                    stream=bool(self.body.stream),
                    **asdict(self.logprob_options()),
                )
                for choice in range(n)
            ]
        check_logprobs(sequences, self.names)
        return sequences

    async def _chunks(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        for chunk in self.first_chunks():
            yield self._chunk([chunk])
        async for event in generation:
            self.choices[event.index].add(event.output, event.text)
            delta = self.chunk_choice(event)
            if delta is not None:
                yield self._chunk([delta])
        if self.body.include_usage:
            yield self._envelope(self.chunk_object, []) | {"usage": self._usage(self.prompts, self.choices)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._envelope(self.chunk_object, choices)
        if self.body.continuous_usage:
            mine = [self.choices[choice["index"]] for choice in choices]
            return chunk | {"usage": self._usage([c.request.input_ids for c in mine], mine)}
        return chunk | {"usage": None} if self.body.include_usage else chunk

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model_name}
        return head | {"choices": choices}

    @staticmethod
    def _usage(prompts: list[list[int]], choices: list[Choice]) -> dict[str, Any]:
        prompt = sum(len(ids) for ids in prompts)
        completion = sum(c.completion_tokens for c in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in choices)},
        }

    default_max_tokens: int | None = None  # None: as many as there is room for
    add_special_tokens = True

    def first_chunks(self) -> list[dict[str, Any]]:
        return []

    @abstractmethod
    def max_tokens(self) -> int | None: ...

    @abstractmethod
    def prompt_inputs(self) -> Sequence[str | list[int]]: ...

    @abstractmethod
    def logprob_options(self) -> LogprobOptions: ...

    @abstractmethod
    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def chunk_choice(self, event: Event) -> dict[str, Any] | None:
        """What to send of an event; None: nothing yet."""


class CompletionServing(OpenAIServing[CompletionRequest]):
    id_prefix = "cmpl"
    object = chunk_object = "text_completion"
    names = LIMIT_NAMES | {
        "input_ids": "prompt",
        "top_logprobs_num": "logprobs",
        "logprob_start_len": "echo",
    }
    default_max_tokens = DEFAULT_COMPLETION_TOKENS

    def __init__(
        self, manager: TokenizerManager, model_names: Sequence[str], body: CompletionRequest
    ) -> None:
        super().__init__(manager, model_names, body)
        self._offsets: dict[int, int] = {}  # of each streamed choice's next token, in characters

    def max_tokens(self) -> int | None:
        return self.body.max_tokens

    def prompt_inputs(self) -> Sequence[str | list[int]]:
        prompt = self.body.prompt
        if not prompt:
            raise RequestError.bad("prompt must not be empty", "prompt")
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return prompt if several else [prompt]

    def logprob_options(self) -> LogprobOptions:
        wanted = self.body.logprobs is not None
        return LogprobOptions(wanted, 0 if wanted and self.body.echo else -1, self.body.logprobs or 0)

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.input_logprobs + choice.output_logprobs, 0)
        return _choice(index, {"text": self._echo(index) + choice.text}, logprobs, choice.finish_reason)

    def chunk_choice(self, event: Event) -> dict[str, Any] | None:
        output, index = event.output, event.index
        text = event.text if index in self._offsets else self._echo(index) + event.text
        new = (output.input_logprobs or []) + (output.output_logprobs or [])
        offset = self._offsets.setdefault(index, 0)
        if not (text or new or output.finish_reason):
            return None
        logprobs = self._logprobs(new, offset)
        if logprobs is not None:
            self._offsets[index] += sum(map(len, logprobs["tokens"]))
        return _choice(index, {"text": text}, logprobs, output.finish_reason)

    def _echo(self, index: int) -> str:
        """The prompt of a choice where it is asked for: as it was written, or the text of its tokens."""
        if not self.body.echo:
            return ""
        prompt = self.prompt_inputs()[index // (self.body.n or 1)]
        if isinstance(prompt, str):
            return prompt
        return self.manager.tokenizer.decode(
            prompt, skip_special_tokens=self.body.skip_special_tokens is not False
        )

    def _logprobs(self, entries: list[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token = self._token(entry.token_id)
            result["tokens"].append(token)
            result["token_logprobs"].append(entry.logprob)
            known = entry.logprob is not None  # of all but the first token of a prompt
            result["top_logprobs"].append({self._token(t): p for t, p in entry.top} if known else None)
            result["text_offset"].append(offset)
            offset += len(token)
        return result

    def _token(self, token_id: int) -> str:
        return self.manager.token_text(token_id)


class ChatServing(OpenAIServing[ChatCompletionRequest]):
    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    names = LIMIT_NAMES | {"input_ids": "messages", "top_logprobs_num": "top_logprobs"}
    add_special_tokens = False  # the template writes them

    def max_tokens(self) -> int | None:
        limit = self.body.max_completion_tokens
        return self.body.max_tokens if limit is None else limit

    def prompt_inputs(self) -> Sequence[str | list[int]]:
        return [chat_prompt(self.manager.tokenizer, self.body.messages)]

    def logprob_options(self) -> LogprobOptions:
        return LogprobOptions(bool(self.body.logprobs), -1, self.body.top_logprobs or 0)

    def first_chunks(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [_choice(i, {"delta": delta}, None, None) for i in range(len(self.choices))]

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.output_logprobs)
        return _choice(index, {"message": message}, logprobs, choice.finish_reason)

    def chunk_choice(self, event: Event) -> dict[str, Any] | None:
        new, reason = event.output.output_logprobs or [], event.output.finish_reason
        if not (event.text or new or reason):
            return None
        delta = {"content": event.text} if event.text else {}
        return _choice(event.index, {"delta": delta}, self._logprobs(new), reason)

    def _logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {
            "content": [
                self._entry(e.token_id, e.logprob) | {"top_logprobs": [self._entry(t, p) for t, p in e.top]}
                for e in entries
            ],
            "refusal": None,
        }

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        token = self.manager.token_text(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _choice(
    index: int, content: dict[str, Any], logprobs: dict[str, Any] | None, reason: dict[str, Any] | None
) -> dict[str, Any]:
    finish = {
        "finish_reason": reason["type"] if reason else None,
        "matched_stop": reason.get("matched") if reason else None,
    }
    return {"index": index, **content, "logprobs": logprobs, **finish}
