"""Bodies of the HTTP requests: how they are parsed, and what is said about one that is wrong.

A parameter that this server does not implement is an error, unless its value asks for nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sglang.srt.entrypoints.no_effect import Values, asks_for_nothing
from sglang.srt.errors import MAX_SHOWN, RequestError, shown
from sglang.srt.sampling.sampling_params import MAX_LOGIT_BIAS, SamplingParams

MAX_SEQUENCES = 1024  # of one request: prompts times choices
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_STOP_TOKEN_IDS = 1024

MAX_RID_CHARS = 256

B = TypeVar("B", bound="Body")
Rid = Annotated[str, Field(max_length=MAX_RID_CHARS)]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Stop = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
Stops = Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)]
# Their values are checked against the vocabulary: pydantic's own checks would take longer than all the rest.
Tokens = Annotated[list[int], Field(fail_fast=True)]
T = TypeVar("T")
Several = Annotated[list[T], Field(fail_fast=True, max_length=MAX_SEQUENCES)]  # one for each prompt
LEFT_TO_RIGHT = Field(union_mode="left_to_right")  # the other mode tries, and describes, all members
Prompts = Annotated[str | Several[str] | Tokens | Several[Tokens], LEFT_TO_RIGHT]


def _token_names(bias: Any) -> Any:
    """JSON names tokens by strings; callers in Python may use numbers."""
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        values = {"count": len(bias), "limit": MAX_LOGIT_BIAS}
        raise PydanticCustomError("too_long", "at most {limit} tokens, not {count}", values)
    return {str(token): value for token, value in bias.items()} if isinstance(bias, dict) else bias


LogitBias = Annotated[dict[str, float], BeforeValidator(_token_names)]


class Body(BaseModel):
    """A JSON object with known members only; types are strict and numbers finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)
    no_effect: ClassVar[dict[str, Values]] = {}

    @classmethod
    @functools.cache
    def _names(cls) -> frozenset[str]:
        return frozenset(cls.model_fields) | {f.alias for f in cls.model_fields.values() if f.alias}

    @model_validator(mode="before")
    @classmethod
    def _drop_parameters_without_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # The first one stops the parsing: pydantic would describe each of a million.
        known = cls._names() | cls.no_effect.keys()
        if (unknown := next((name for name in data if name not in known), None)) is not None:
            message = "unknown parameter {param}: it is not supported by this server"
            raise PydanticCustomError("unsupported", message, {"param": unknown[:MAX_SHOWN]})
        for name in data.keys() & cls.no_effect.keys():
            if not asks_for_nothing(data[name], cls.no_effect[name]):
                message = "{param}={value} is not supported by this server"
                raise PydanticCustomError("unsupported", message, {"param": name, "value": shown(data[name])})
        return {name: value for name, value in data.items() if name not in cls.no_effect}


def parse_body(kind: type[B], body: bytes | bytearray) -> B:
    """Raises RequestError (400) that names the parameter."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error) from error


def parse_members(kind: type[B], members: dict[str, Any]) -> B:
    """The same from Python values, by the same rules. Raises RequestError (400) that names the parameter."""
    try:
        body = json.dumps(members)
    except (TypeError, ValueError) as error:
        raise RequestError.bad(f"a parameter is no JSON value: {error}") from error
    return parse_body(kind, body.encode())


def _request_error(error: ValidationError) -> RequestError:
    details = error.errors(include_url=False)
    first = details[0]
    if first["type"] == "json_invalid":
        return RequestError.bad(f"the body is not valid JSON: {first['ctx']['error']}")
    param = _path(first["loc"])
    if first["type"] == "unsupported":
        name = first["ctx"]["param"]
        full = f"{param}.{name}" if param else name
        return RequestError.bad(first["msg"].replace(name, full, 1), full)
    # A union reports each of its members; those that the value is not at all say nothing about its parts.
    inside = [d for d in details if f"{_path(d['loc'])}.".startswith(f"{param}.")]
    expected = ", or ".join(dict.fromkeys(d["msg"] for d in inside))
    return RequestError.bad(f"{param or 'body'}: {expected}; got {shown(first['input'])}", param or None)


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content", "str") -> messages.0.content: without the names of a union's members."""
    members = {"str", "int", "float", "bool", *(kind.__name__ for kind in _kinds(Body))}
    names = [
        p for p in loc if isinstance(p, int) or not (p in members or "[" in p or p.startswith("constrained-"))
    ]
    return ".".join(map(str, names))


def _kinds(kind: type[Body]) -> Iterator[type[Body]]:
    for one in kind.__subclasses__():
        yield one
        yield from _kinds(one)


class SamplingBody(Body):
    """How to sample: the same members in all requests. None stands for the default."""

    temperature: float | None = None
    top_p: float | None = None
    stop: Stops | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None
    min_new_tokens: Int32 | None = None
    stop_token_ids: Annotated[list[Int32], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None

    def sampling_params(self, max_new_tokens: int | None) -> SamplingParams:
        names = (
            "seed",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "logit_bias",
            "min_new_tokens",
            "ignore_eos",
            "skip_special_tokens",
            "no_stop_trim",
        )
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        given["stop"] = tuple(dict.fromkeys(stop or ()))
        given["stop_token_ids"] = tuple(dict.fromkeys(self.stop_token_ids or ()))
        given["max_new_tokens"] = max_new_tokens
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})
