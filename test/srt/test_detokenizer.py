"""Text out of tokens in pieces: however they are cut, the pieces joined are the text of the whole."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.detokenizer import IncrementalDetokenizer, OutputText
from sglang.srt.sampling.sampling_params import SamplingParams
from tiny_tokenizers import KINDS, make_tokenizer, token_lists

EOS = 257


@pytest.fixture(scope="module")
def tokenizer(dummy_model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(dummy_model)


def pieces(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


# Bytes that are often not UTF-8, real characters of one to four bytes, and special tokens.
texts = st.text(alphabet="ab\n é€𝄞\ufffd", max_size=12).map(lambda s: list(s.encode()))
noise = st.lists(st.integers(0, 319), max_size=12)
tokens = st.lists(texts | noise, max_size=4).map(lambda parts: list(itertools.chain(*parts)))
cuts = st.lists(st.integers(0, 60), max_size=8)


@given(ids=tokens, cuts=cuts, skip=st.booleans())
def test_pieces_join_to_the_whole(tokenizer: Any, ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    parts = [detokenizer.feed(piece) for piece in pieces(ids, cuts)]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(parts) + detokenizer.held == whole


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), cuts=cuts, skip=st.booleans())
def test_every_kind_of_decoder_joins_to_the_whole(
    kind: str, data: st.DataObject, cuts: list[int], skip: bool
) -> None:
    """Bugs: bytes to fall back to were given out as replacements before their character was whole, and after
    a hidden token the space before a word was lost."""
    tokenizer, ids = make_tokenizer(kind), data.draw(token_lists(kind))
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    parts = [detokenizer.feed(piece) for piece in pieces(ids, cuts)]
    assert "".join(parts) + detokenizer.held == tokenizer.decode(ids, skip_special_tokens=skip)


broken = st.lists(st.sampled_from([0x80, 0xE2, 0x82, 0xF0, 0x9F, 0x98, EOS]), min_size=20, max_size=60)


@given(ids=broken, cuts=cuts, skip=st.booleans())
def test_pieces_of_bytes_that_are_no_text_join_to_the_whole(
    tokenizer: Any, ids: list[int], cuts: list[int], skip: bool
) -> None:
    test_pieces_join_to_the_whole.hypothesis.inner_test(tokenizer, ids, cuts, skip)


@pytest.mark.parametrize(
    "pattern", [b"\x80", b"\xe2", b"\xe2\x82", b"\xf0\x9f", b"\xf0\x9f\x98", b"\xed\xa0\x80"]
)
@pytest.mark.parametrize("fed", [1, 4, 5])
def test_bytes_that_never_become_text_cost_no_more_than_text(
    tokenizer: Any, pattern: bytes, fed: int
) -> None:
    """Bug: all of them were decoded again with each token: a request of 4,000 such tokens, which a bias can
    ask for, kept the HTTP process busy for longer than the model."""

    class Counting:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        longest = 0

        def decode(self, ids: list[int], **options: Any) -> str:
            self.longest = max(self.longest, len(ids))
            return tokenizer.decode(ids, **options)

    counting, ids = Counting(), list(pattern * 100)
    detokenizer = IncrementalDetokenizer(counting)
    parts = [detokenizer.feed(ids[i : i + fed]) for i in range(0, len(ids), fed)]
    assert "".join(parts) + detokenizer.held == tokenizer.decode(ids)
    assert counting.longest < 60


def test_long_stops_that_nearly_match_are_compared_once(tokenizer: Any) -> None:
    """Bug: every start of every stop was compared with each token: 2.7 ms of the HTTP process for each."""

    class Counting(str):
        compared = 0

        def startswith(self, *given: Any) -> bool:
            Counting.compared += 1
            return super().startswith(*given)

    params = SamplingParams(stop=tuple(Counting("a" * 300 + end) for end in "bcdefghi"))
    output = OutputText(tokenizer, params)
    parts = [output.feed([ord("a")], None) for _ in range(1000)]
    assert "".join(parts) == "a" * 700
    assert Counting.compared < 1000 * 2 * len(params.stop)


@given(text=st.text(max_size=20))
def test_valid_text_never_shows_a_replacement(tokenizer: Any, text: str) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    parts = [detokenizer.feed([byte]) for byte in text.encode()]
    assert "".join(parts) + detokenizer.held == text
    for part in parts:
        assert "\ufffd" not in part or "\ufffd" in text


def reference(tokenizer: Any, ids: list[int], params: SamplingParams, reason: dict[str, Any]) -> str:
    """All tokens at once, cut before the first stop."""
    if not params.no_stop_trim and reason.get("matched") == ids[-1]:
        ids = ids[:-1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = [] if params.no_stop_trim else [text.find(s) for s in params.stop if s in text]
    return text[: min(found, default=len(text))]


@given(
    body=st.text(alphabet="abé", max_size=16),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    cuts=cuts,
    end=st.sampled_from(["length", "stop"]),
    no_trim=st.booleans(),
)
def test_stop_strings_never_show(
    tokenizer: Any, body: str, stops: list[str], cuts: list[int], end: str, no_trim: bool
) -> None:
    """A stream shows what the whole shows, and nothing that is trimmed later."""
    ids = list(body.encode())
    # The scheduler ends a request with the token that completes a stop string.
    ends = [len(body[: body.find(s)].encode()) + len(s.encode()) for s in stops if s in body]
    reason: dict[str, Any] = {"type": "length"}
    if ends:
        ids = ids[: min(ends)]
        text = bytes(ids).decode()
        reason = {"type": "stop", "matched": next(s for s in stops if s in text)}
    elif end == "stop":
        ids, reason = [*ids, EOS], {"type": "stop", "matched": EOS}
    if not ids:
        return
    params = SamplingParams(stop=tuple(stops), no_stop_trim=no_trim)
    output, parts = OutputText(tokenizer, params), []
    chunks = pieces(ids, cuts)
    for i, piece in enumerate(chunks):
        parts.append(output.feed(piece, reason if i == len(chunks) - 1 else None))
    assert "".join(parts) == reference(tokenizer, ids, params, reason)


@given(ids=tokens.filter(bool), cuts=cuts, stop_at_eos=st.booleans())
def test_offsets_say_where_each_token_ends(
    tokenizer: Any, ids: list[int], cuts: list[int], stop_at_eos: bool
) -> None:
    """However the tokens come: after token i lies what the tokens up to i complete."""
    reason: dict[str, Any] = {"type": "length"}
    if stop_at_eos:
        ids, reason = [*ids, EOS], {"type": "stop", "matched": EOS}
    output, text, offsets = OutputText(tokenizer, SamplingParams(), with_offsets=True), "", []
    chunks = pieces(ids, cuts)
    for i, piece in enumerate(chunks):
        text += output.feed(piece, reason if i == len(chunks) - 1 else None)
        offsets += output.take_offsets()
    detokenizer, expected = IncrementalDetokenizer(tokenizer), []
    for token in ids:
        expected.append((expected or [0])[-1] + len(detokenizer.feed([token])))
    assert len(offsets) == len(ids) and offsets[:-1] == expected[:-1]
    assert not chunks[-1] or offsets[-1] == len(text)
    assert OutputText(tokenizer, SamplingParams()).take_offsets() == []


def test_stop_token_is_trimmed_and_kept(tokenizer: Any) -> None:
    reason = {"type": "stop", "matched": ord("b")}
    assert OutputText(tokenizer, SamplingParams()).feed(list(b"ab"), reason) == "a"
    assert OutputText(tokenizer, SamplingParams(no_stop_trim=True)).feed(list(b"ab"), reason) == "ab"
