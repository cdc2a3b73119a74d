"""A conversation as the text that the model completes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from sglang.srt.entrypoints.openai_protocol import Message
from sglang.srt.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The template writes the special tokens too. Raises RequestError (400)."""
    if tokenizer.chat_template is None:
        raise RequestError.bad("the model's tokenizer has no chat template: use /v1/completions", "messages")
    given = [message.as_template_input() for message in messages]
    try:
        return tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise RequestError.bad(f"messages do not fit the chat template: {error}", "messages") from error
