"""Bodies of SGLang's requests about tokens: /tokenize, /detokenize and /v1/score."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sglang.srt.entrypoints import no_effect
from sglang.srt.entrypoints.openai_protocol import Message
from sglang.srt.entrypoints.request_body import Body, Int32
from sglang.srt.errors import RequestError

MAX_CHARS = 1 << 20  # of all texts to tokenize: each takes some 300 bytes of memory
MAX_TOKENS = 1 << 20  # to turn into text
MAX_SEVERAL = 4096  # texts or lists of tokens in one request
MAX_JOINED = 1 << 24  # characters or tokens of all prompts of a scoring request

Text = Annotated[str, Field(max_length=MAX_CHARS)]
Texts = Annotated[list[Text], Field(max_length=MAX_SEVERAL)]
TokenIds = Annotated[list[Int32], Field(max_length=MAX_TOKENS)]
SeveralTokenIds = Annotated[list[TokenIds], Field(max_length=MAX_SEVERAL)]


class TokenizeRequest(Body):
    """POST /tokenize."""

    model: str | None = None
    prompt: Text | Texts | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    no_effect: ClassVar = no_effect.TOKENIZE

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("unsupported", "give either {param} or messages", {"param": "prompt"})
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds | SeveralTokenIds
    skip_special_tokens: bool | None = None


class ScoringRequest(Body):
    """POST /v1/score: how likely each of the label tokens is after the query and each of the items."""

    model: str | None = None
    query: Text | TokenIds
    items: Text | Texts | SeveralTokenIds
    label_token_ids: Annotated[list[Int32], Field(min_length=1, max_length=MAX_SEVERAL)]
    apply_softmax: bool | None = None
    item_first: bool | None = None
    no_effect: ClassVar = no_effect.SCORE

    @model_validator(mode="after")
    def _all_text_or_all_ids(self) -> ScoringRequest:
        if any(isinstance(item, str) != isinstance(self.query, str) for item in self.several):
            message = "{param} must be text where query is, and token ids where query is"
            raise PydanticCustomError("unsupported", message, {"param": "items"})
        return self

    @property
    def several(self) -> list[str] | list[list[int]]:
        return [self.items] if isinstance(self.items, str) else self.items

    def prompts(self) -> list[str] | list[list[int]]:
        """Query and item, joined, for each item. Raises RequestError (400) where that is too much."""
        items = self.several
        size = len(self.query) * len(items) + sum(map(len, items))
        if size > MAX_JOINED:
            message = f"query before each of {len(items)} items is {size} long: at most {MAX_JOINED} together"
            raise RequestError.bad(message, "items")
        return [item + self.query if self.item_first else self.query + item for item in items]
