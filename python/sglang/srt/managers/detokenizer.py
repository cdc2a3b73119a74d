"""Token ids to text, a few at a time: the pieces joined are the text of the whole."""

from __future__ import annotations

from typing import Any, Protocol

from sglang.srt.managers.stop_checker import find_stop
from sglang.srt.sampling.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"  # what a decoder puts for bytes that are not, or not yet, UTF-8
MAX_CHARACTER_TOKENS = 4  # a character has at most as many bytes
MAX_PENDING_TOKENS = 16  # tokens without the end of a character, before the window is cut among them


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int], **options: Any) -> str: ...


class IncrementalDetokenizer:
    """Decodes a growing list of tokens and never gives out half of a character.

    Only a window is decoded again at each call: the tokens since the last one that ended a character, and
    those of the call before it as context, because a decoder may treat the start of a text differently.
    A truncated character decodes to one replacement character at the end, so just that one is held back.
    Bytes that never become characters end in one for ever: then the window is cut between two of them.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._options = {
            "skip_special_tokens": skip_special_tokens,
            "clean_up_tokenization_spaces": False,
        }
        self._window: list[int] = []
        self._context = 0  # tokens at the start of the window whose text was given out
        self._given = 0  # characters of the rest of the window that were given out

    def feed(self, ids: list[int]) -> str:
        """The text that these tokens complete."""
        self._window += ids
        text = self._fresh_text()
        if text.endswith(REPLACEMENT):
            new, self._given = text[self._given : -1], max(len(text) - 1, self._given)
            if len(self._window) - self._context > MAX_PENDING_TOKENS:
                self._cut(text)
            return new
        new = text[self._given :]
        self._start_at(len(self._window), 0)
        return new

    def _cut(self, text: str) -> None:
        """Starts the window's new part as late as whole characters, or replaced ones, end before it.

        Where two parts have the text of the whole, no character lies across: one that does would be two
        replacements.
        """
        for start in range(len(self._window) - 1, len(self._window) - 1 - MAX_CHARACTER_TOKENS, -1):
            rest = self._decode(self._window[start:])
            settled = self._decode(self._window[self._context : start])
            if rest and settled + rest == text:
                self._start_at(start, self._given - len(settled))
                return

    def _start_at(self, start: int, given: int) -> None:
        """The window's new part begins at token `start`; what was new before becomes its context."""
        del self._window[: self._context]
        self._context, self._given = start - self._context, given

    def flush(self) -> str:
        """What is held back, as it stands."""
        return self._fresh_text()[self._given :]

    def _fresh_text(self) -> str:
        known = self._decode(self._window[: self._context])
        return self._decode(self._window)[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, **self._options) if ids else ""


class OutputText:
    """The text of one sequence: without the stop that ended it, unless `no_stop_trim`.

    Text that may still become a stop string is held back, so that what a stream has given out is always a
    prefix of the final text.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, with_offsets: bool = False) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
        self._trim = not params.no_stop_trim
        self._stops = params.stop if self._trim else ()
        self._held = ""
        self._given = 0  # characters given out
        self._offsets: list[int] | None = [] if with_offsets else None

    def feed(self, ids: list[int], finish_reason: dict[str, Any] | None) -> str:
        """The text to give out now; `finish_reason` is set with the last tokens."""
        matched = finish_reason.get("matched") if finish_reason else None
        shown = ids[:-1] if self._trim and isinstance(matched, int) and ids[-1:] == [matched] else ids
        for piece in [shown] if self._offsets is None else [[token] for token in shown]:
            self._held += self._detokenizer.feed(piece)
            self._mark(len(piece))
        if finish_reason is not None:
            self._held += self._detokenizer.flush()
            self._mark(len(ids) - len(shown))
            if self._offsets:  # half a character that nothing completes
                self._offsets[-1] = self._given + len(self._held)
        found = find_stop(self._held, self._stops)
        if finish_reason is not None:
            # The scheduler judges what a stop is; without its word a stop string is text.
            return self._held[: found[0] if found and isinstance(matched, str) else None]
        cut = found[0] if found else len(self._held) - self._may_become_stop()
        given, self._held = self._held[:cut], self._held[cut:]
        self._given += cut
        return given

    def take_offsets(self) -> list[int]:
        """With `with_offsets`, where each token fed since the last call ends: the characters up to there.

        They count what is held back and the stop string too, so the last ones may lie beyond the text. A
        character of several tokens belongs to the one that completes it.
        """
        taken, self._offsets = self._offsets, None if self._offsets is None else []
        return taken or []

    def _mark(self, tokens: int) -> None:
        if self._offsets is not None:
            self._offsets += [self._given + len(self._held)] * tokens

    def _may_become_stop(self) -> int:
        """Length of the longest end of the held text, which holds no stop string, that starts one."""
        longest = min(len(self._held), max(map(len, self._stops), default=0))
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
