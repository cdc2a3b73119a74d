"""Token ids to text, a few at a time: the pieces joined are the text of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.tokenizer import HasAddedTokens, special_tokens

REPLACEMENT = "\ufffd"  # what a decoder puts for bytes that are not, or not yet, UTF-8
MAX_CHARACTER_TOKENS = 4  # a character has at most as many bytes
MAX_WINDOW = 6  # tokens that are decoded again, where the last one ends a character
MAX_PENDING = 16  # and where none of the last ones does


class Tokenizer(HasAddedTokens, Protocol):
    def decode(self, token_ids: list[int], **options: Any) -> str: ...


class IncrementalDetokenizer:
    """Decodes a growing list of tokens and never gives out half of a character.

    Only a window is decoded again at each call, the last few tokens: a decoder may treat the start of a text
    differently, and half a character decodes to replacement characters at the end, which are held back.
    Bytes that never become characters end in them for ever: then all but the last ones are given out.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = special_tokens(tokenizer).keys() if skip_special_tokens else frozenset[int]()
        self._window: list[int] = []  # of the tokens that are shown
        self._given = 0  # characters of the window's text that were given out
        self.held = ""  # what follows them: the tokens' text as it stands ends in it

    def feed(self, ids: list[int]) -> str:
        """The text that these tokens complete."""
        shown = [token for token in ids if token not in self._hidden]
        if not shown:
            return ""
        self._window += shown
        text, half = self._decode(self._window), list[int]()
        if text.endswith(REPLACEMENT) and len(self._window) > MAX_PENDING:
            text, half = self._set_half_apart(text)
        start, end = self._given, max(self._given, len(text.rstrip(REPLACEMENT)))
        if len(self._window) > (MAX_WINDOW if end == len(text) else MAX_PENDING):
            end = max(end, self._shorten(text, end))
        else:
            self._given = end
        self.held = text[end:]
        if half:
            self._window += half
            self.held = self._decode(self._window)[self._given :]
        return text[start:end]

    def _set_half_apart(self, text: str) -> tuple[str, list[int]]:
        """The text up to its last whole character, and the tokens of the half one, which leave the window.

        It is not always how `text` begins: of a run of bytes that ends in half a character, some decoders
        replace all.
        """
        for count in range(1, MAX_CHARACTER_TOKENS):
            whole = self._decode(self._window[:-count])
            if not whole.endswith(REPLACEMENT):
                half = self._window[-count:]
                del self._window[-count:]
                return whole, half
        return text, []

    def _shorten(self, text: str, end: int) -> int:
        """Starts the window at a late token that starts a character. Returns where its text begins.

        From such a token on the text is the end of the whole, and where that may be half a character, the two
        parts are no longer than the whole: one that was cut would be a replacement in both.
        """
        for start in range(len(self._window) - 1, len(self._window) - MAX_WINDOW, -1):
            rest = self._decode(self._window[start:])
            before = len(text) - len(rest)
            if text.endswith(rest) and (
                end == len(text) or len(self._decode(self._window[:start])) <= before
            ):
                break
        del self._window[:start]
        self._given = max(end - before, 0)
        return before

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def find_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop string begins, and which it is."""
    return min(((text.find(stop), stop) for stop in stops if stop in text), default=None)


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
            self._held += self._detokenizer.held
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
