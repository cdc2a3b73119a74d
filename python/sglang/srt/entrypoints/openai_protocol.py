"""Bodies of OpenAI's requests. Its own fields come first in each class, SGLang's additions after them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sglang.srt.entrypoints import no_effect
from sglang.srt.entrypoints.request_body import Body, Int32, Prompts, Rid, SamplingBody
from sglang.srt.sampling.token_logprob import MAX_TOP_LOGPROBS

MAX_NAME_CHARS = 1024
MAX_MESSAGES = 4096
MAX_PARTS = 256  # of one message

Positive = Annotated[int, Field(ge=1, lt=2**31)]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    no_effect: ClassVar = no_effect.STREAM_OPTIONS


class OpenAIRequest(SamplingBody):
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # OpenAI's limits
    model: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    rid: Rid | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    min_new_tokens: Annotated[Int32 | None, Field(alias="min_tokens")] = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> OpenAIRequest:
        if self.stream_options is not None and not self.stream:
            message = "{param} is only allowed when stream is true"
            raise PydanticCustomError("unsupported", message, {"param": "stream_options"})
        return self

    @property
    def include_usage(self) -> bool:
        """One more chunk at the end with the figures of the whole request."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """In every chunk the figures of its choice so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Positive | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    no_effect: ClassVar = no_effect.COMPLETION

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            message = "{param}={best_of} with n={n}: all choices are returned, so {param} must be n"
            values = {"param": "best_of", "best_of": self.best_of, "n": self.n or 1}
            raise PydanticCustomError("unsupported", message, values)
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)]
    name: str | None = None
    no_effect: ClassVar = no_effect.MESSAGE

    def as_template_input(self) -> dict[str, str]:
        """What a chat template takes: text as one string, and no role that is newer than templates."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatCompletionRequest(OpenAIRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Positive | None = None
    max_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    no_effect: ClassVar = no_effect.CHAT

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            message = "{param} is only allowed when logprobs is true"
            raise PydanticCustomError("unsupported", message, {"param": "top_logprobs"})
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            message = "{param} and max_tokens are names of the same limit, but their values differ"
            raise PydanticCustomError("unsupported", message, {"param": "max_completion_tokens"})
        return self
