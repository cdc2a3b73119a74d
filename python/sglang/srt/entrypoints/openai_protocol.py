"""Bodies of the HTTP requests: types, what is accepted, and what is refused by name.

A parameter that this server does not implement is an error, unless its value changes nothing: those
values stand in `no_effect`. OpenAI's own fields come first in each class, SGLang's additions after them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sglang.srt.errors import RequestError
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.sampling.token_logprob import MAX_TOP_LOGPROBS

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 512

B = TypeVar("B", bound="Body")
AnyValue = None  # in `no_effect`: the parameter never changes what is generated
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Stop = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]


class Body(BaseModel):
    """A JSON object with known members only; types are strict and numbers finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)
    no_effect: ClassVar[dict[str, tuple[Any, ...] | None]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_parameters_without_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data.keys() & cls.no_effect.keys():
            allowed = cls.no_effect[name]
            if allowed is not AnyValue and data[name] not in allowed:
                message = "{param}={value} is not supported by this server"
                raise PydanticCustomError("unsupported", message, {"param": name, "value": repr(data[name])})
        return {name: value for name, value in data.items() if name not in cls.no_effect}


def parse_body(kind: type[B], body: bytes) -> B:
    """Raises RequestError (400) that names the parameter."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error) from error


def _request_error(error: ValidationError) -> RequestError:
    details = error.errors(include_url=False)
    first = details[0]
    if first["type"] == "json_invalid":
        return RequestError.bad(f"the body is not valid JSON: {first['ctx']['error']}")
    param = first.get("ctx", {}).get("param") or _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return RequestError.bad(f"unknown parameter {param}: it is not supported by this server", param)
    if first["type"] == "unsupported":
        return RequestError.bad(first["msg"], param)
    # A union reports each of its members.
    same = dict.fromkeys(d["msg"] for d in details if d["loc"][:1] == first["loc"][:1])
    value = repr(first["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    return RequestError.bad(f"{param or 'body'}: {', or '.join(same)}; got {value}", param or None)


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content", "str") -> messages.0.content: without the names of a union's members."""
    types = ("str", "int", "float", "bool")
    names = [
        p for p in loc if isinstance(p, int) or not (p in types or "[" in p or p.startswith("constrained-"))
    ]
    return ".".join(map(str, names))


class SamplingBody(Body):
    """How to sample: the same members in all requests. None stands for the default."""

    temperature: float | None = None
    top_p: float | None = None
    stop: Stops | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    stop_token_ids: list[Int32] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None

    def sampling_params(self, max_new_tokens: int | None, choice: int) -> SamplingParams:
        """Of the choice-th of n: with a seed, each choice has a seed of its own."""
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "ignore_eos",
            "skip_special_tokens",
            "no_stop_trim",
        )
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        given["stop"] = None if stop is None else tuple(stop)
        given["stop_token_ids"] = None if self.stop_token_ids is None else tuple(self.stop_token_ids)
        given["seed"] = None if self.seed is None else self.seed + choice
        given["max_new_tokens"] = max_new_tokens
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


class StreamOptions(Body):
    include_usage: bool = False
    no_effect: ClassVar = {"include_obfuscation": (None, False)}


# What OpenAI's two endpoints have in common and this server need not act on.
OPENAI_NO_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "user": AnyValue,
}


class OpenAIRequest(SamplingBody):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Int32 | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> OpenAIRequest:
        if self.stream_options is not None and not self.stream:
            message = "{param} is only allowed when stream is true"
            raise PydanticCustomError("unsupported", message, {"param": "stream_options"})
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Int32] | list[list[Int32]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    no_effect: ClassVar = OPENAI_NO_EFFECT | {
        "echo": (None, False),
        "suffix": (None, ""),
        "best_of": (None, 1),
    }


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def as_template_input(self) -> dict[str, str]:
        """What a chat template takes: text as one string, and no role that is newer than templates."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatCompletionRequest(OpenAIRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    no_effect: ClassVar = OPENAI_NO_EFFECT | {
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": AnyValue,
        "functions": (None, []),
        "function_call": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
        "store": (None, False),
        "metadata": AnyValue,
        "service_tier": (None, "auto", "default"),
        "safety_identifier": AnyValue,
        "prompt_cache_key": AnyValue,
        "prompt_cache_retention": AnyValue,
    }

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            message = "{param} is only allowed when logprobs is true"
            raise PydanticCustomError("unsupported", message, {"param": "top_logprobs"})
        if None not in (self.max_tokens, self.max_completion_tokens):
            message = "{param} and max_tokens are the same: give one of them"
            raise PydanticCustomError("unsupported", message, {"param": "max_completion_tokens"})
        return self


class GenerateSamplingParams(SamplingBody):
    """`sampling_params` of /generate."""

    max_new_tokens: Int32 | None = None
    seed: Annotated[int | None, Field(alias="sampling_seed")] = None
    no_effect: ClassVar = {
        "frequency_penalty": (None, 0),
        "presence_penalty": (None, 0),
        "repetition_penalty": (None, 1),
        "min_new_tokens": (None, 0),
        "spaces_between_special_tokens": (None, True),
        "json_schema": (None,),
        "regex": (None,),
        "ebnf": (None,),
        "structural_tag": (None,),
        "logit_bias": (None, {}),
        "custom_params": (None,),
    }


class GenerateReqInput(Body):
    """POST /generate: SGLang's own form. A member that a batch may have one by one takes a list."""

    text: str | list[str] | None = None
    input_ids: list[Int32] | list[list[Int32]] | None = None
    sampling_params: GenerateSamplingParams | list[GenerateSamplingParams] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: Int32 | list[Int32] | None = None
    top_logprobs_num: Int32 | list[Int32] | None = None
    return_text_in_logprobs: bool = False
    return_token_sources: bool = False
    stream: bool = False
    no_effect: ClassVar = {
        "image_data": (None,),
        "video_data": (None,),
        "audio_data": (None,),
        "input_embeds": (None,),
        "token_ids_logprob": (None,),
        "return_hidden_states": (None, False),
        "lora_path": (None,),
        "log_metrics": AnyValue,
        "priority": (None,),
    }

    @model_validator(mode="after")
    def _text_or_ids(self) -> GenerateReqInput:
        if (self.text is None) == (self.input_ids is None):
            raise PydanticCustomError("unsupported", "give either {param} or input_ids", {"param": "text"})
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """A batch of one where the request is not a batch."""
        given = self.text if self.text is not None else self.input_ids
        return given if self.is_batch else [given]

    @property
    def is_batch(self) -> bool:
        if self.text is not None:
            return isinstance(self.text, list)
        return bool(self.input_ids) and isinstance(self.input_ids[0], list)


class AbortRequest(Body):
    """POST /abort_request."""

    rid: str | None = None
    abort_all: bool = False
