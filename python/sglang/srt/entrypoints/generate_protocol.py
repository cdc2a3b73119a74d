"""Bodies of SGLang's own requests: POST /generate and what belongs to it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sglang.srt.entrypoints import no_effect
from sglang.srt.entrypoints.request_body import LEFT_TO_RIGHT, Body, Int32, Rid, SamplingBody, Several, Tokens


class GenerateSamplingParams(SamplingBody):
    """`sampling_params` of /generate."""

    max_new_tokens: Int32 | None = None
    seed: Annotated[int | None, Field(alias="sampling_seed")] = None
    no_effect: ClassVar = no_effect.GENERATE_SAMPLING


class GenerateReqInput(Body):
    """POST /generate: SGLang's own form. A member that a batch may have one by one takes a list."""

    text: str | Several[str] | None = None
    input_ids: Annotated[Tokens | Several[Tokens], LEFT_TO_RIGHT] | None = None
    sampling_params: GenerateSamplingParams | Several[GenerateSamplingParams] | None = None
    rid: Rid | Several[Rid] | None = None
    return_logprob: bool | Several[bool] | None = None
    logprob_start_len: Int32 | Several[Int32] | None = None
    top_logprobs_num: Int32 | Several[Int32] | None = None
    return_text_in_logprobs: bool | None = None
    return_token_sources: bool | None = None
    stream: bool | None = None
    no_effect: ClassVar = no_effect.GENERATE

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
    def prompt_name(self) -> str:
        return "text" if self.text is not None else "input_ids"

    @property
    def is_batch(self) -> bool:
        if self.text is not None:
            return isinstance(self.text, list)
        return bool(self.input_ids) and isinstance(self.input_ids[0], list)


class AbortRequest(Body):
    """POST /abort_request."""

    rid: Rid | None = None
    abort_all: bool | None = None
