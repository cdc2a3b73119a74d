"""The sequences of one HTTP request, while they run, as the HTTP process sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglang.srt.errors import RequestError
from sglang.srt.managers.detokenizer import OutputText
from sglang.srt.managers.io_struct import ReqOutput, TokenizedGenerateReqInput

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager


@dataclass
class Event:
    """What is new of one sequence of a generation."""

    index: int  # which of the generation's requests
    text: str
    text_offsets: list[int]  # as OutputText.take_offsets says
    output: ReqOutput


@dataclass
class SequenceState:
    """One sequence that the scheduler works on."""

    index: int
    request: TokenizedGenerateReqInput
    names: frozenset[str]  # what its client calls it: its rid, and the rid of the request that it is part of
    text: OutputText
    events: asyncio.Queue[tuple[SequenceState, ReqOutput] | RequestError]
    held_tokens: int = 0  # of the prompt, where no other sequence counts it
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    created: float = field(default_factory=time.perf_counter)
    last_output: float = 0.0


class Generation:
    """The sequences of one HTTP request, running together. Iterate over it once; always close it.

    Closing what is not finished aborts it in the scheduler at once; closing needs no event loop, so it
    also works while a task is being cancelled.
    """

    def __init__(self, manager: TokenizerManager, states: Sequence[SequenceState]) -> None:
        self._manager = manager
        self._states = {state.request.rid: state for state in states}
        self._events = states[0].events

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Raises RequestError where a sequence cannot be completed."""
        while self._states:
            if self._events.qsize():
                await asyncio.sleep(0)  # or a queue that is full would hold up everybody else
            event = await self._events.get()
            if isinstance(event, RequestError):
                raise event
            state, output = event
            if output.finish_reason is not None:
                del self._states[output.rid]
            text = state.text.feed(output.output_ids, output.finish_reason)
            yield Event(state.index, text, state.text.take_offsets(), output)

    def close(self, outcome: str = "disconnect") -> None:
        self._manager.drop(list(self._states), outcome)
        self._states.clear()
