"""Tokenizers of every kind of decoder: what a token's text is depends on its neighbours, each in its way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import transformers
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPECIAL = ["<eos>", "<unnamed>"]  # the second has no role, so that `all_special_ids` lacks it


def _bytes() -> Tokenizer:
    """DeepSeek's: any bytes may be a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _tokenizer([*letters, "ab", "Ġa", "ĠĠ", "Ã©", "Ã©a", "âĤ", "¬Ġ"], decoders.ByteLevel())


def _byte_fallback() -> Tokenizer:
    """Llama's: bytes for what has no token, all of a run replaced where one is wrong; a space stripped."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _tokenizer([*BYTES, "▁", "a", "b", "▁a", "é"], decoders.Sequence(steps))


def _metaspace() -> Tokenizer:
    return _tokenizer(["▁", "a", "b", "▁a", "é", "€", "▁€"], decoders.Metaspace())


def _words() -> Tokenizer:
    """BERT's: a space before each word, and `##` before what goes on with one."""
    return _tokenizer(["a", "b", "é", "##a", "##b", "##€"], decoders.WordPiece("##", cleanup=False))


def _tokenizer(pieces: list[str], decoder: decoders.Decoder) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": _bytes,
    "byte fallback": _byte_fallback,
    "metaspace": _metaspace,
    "words": _words,
}


def make_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), eos_token=SPECIAL[0])


def token_lists(kind: str) -> st.SearchStrategy[list[int]]:
    """Any tokens, broken characters and special tokens too. Of bytes to fall back to, only whole characters:
    one that does not fit changes what the ones before it were."""
    vocabulary = KINDS[kind]().get_vocab()
    pieces = [[i] for piece, i in sorted(vocabulary.items()) if piece not in BYTES]
    if kind == "byte fallback":
        pieces += [[vocabulary[BYTES[byte]] for byte in text.encode()] for text in "x\n¢€😀"]
    return st.lists(st.sampled_from(pieces), max_size=24).map(lambda some: list(chain(*some)))
