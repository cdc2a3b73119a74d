"""Text: the Python standard library's sources, split by file, and a byte-level BPE tokenizer."""

import hashlib
import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .config import BOS, EOS, SPECIALS

HELD_OUT_ONE_IN = 50  # one file in this many is held out
MAX_FILE_BYTES = 256 * 1024  # larger files are generated tables
SKIP_DIRS = frozenset({"site-packages", "dist-packages", "encodings", "__pycache__", "lib2to3"})
PROMPT_LENGTHS = (32, 64, 128, 256, 512, 1024, 1536, 96)  # tokens; held-out prompts cycle through these


@dataclass(frozen=True)
class Corpus:
    """Source files as (relative path, text), sorted by path."""

    train: list[tuple[str, str]]
    held_out: list[tuple[str, str]]

    @property
    def train_bytes(self) -> int:
        return sum(len(text.encode()) for _, text in self.train)

    @property
    def held_out_bytes(self) -> int:
        return sum(len(text.encode()) for _, text in self.held_out)


def is_held_out(path: str) -> bool:
    """The split rule: sha256 of the path relative to the library's root, first 8 bytes, modulo 50."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def read_corpus(root: Path | None = None, limit_bytes: int | None = None) -> Corpus:
    """Reads every ``.py`` file of a standard library; equal files count once.

    Args:
        root: the library's folder; the running interpreter's own where left out.
        limit_bytes: stop the training side after this many bytes (quick runs).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    corpus, seen = Corpus([], []), set()
    size = 0
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if SKIP_DIRS & set(path.parts) or file.stat().st_size > MAX_FILE_BYTES:
            continue
        raw = file.read_bytes()
        digest = hashlib.sha256(raw).digest()
        try:
            text = raw.decode()
        except UnicodeDecodeError:  # a few test inputs are in other encodings on purpose
            continue
        if not raw or digest in seen:
            continue
        seen.add(digest)
        if is_held_out(path.as_posix()):
            corpus.held_out.append((path.as_posix(), text))
        elif limit_bytes is None or size < limit_bytes:
            corpus.train.append((path.as_posix(), text))
            size += len(raw)
    if not corpus.train or not corpus.held_out:
        raise ValueError(
            f"no Python sources under {root}: {len(corpus.train)} + {len(corpus.held_out)} files"
        )
    return corpus


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: all 256 bytes, the special tokens first, merges learned on the training files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in corpus.train), trainer)
    return tokenizer


def encode_files(tokenizer: Tokenizer, files: list[tuple[str, str]]) -> torch.Tensor:
    """One stream ``<bos> file <eos> <bos> file <eos> ...``.  # [tokens], int64"""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    parts: list[np.ndarray] = []
    for encoding in tokenizer.encode_batch([text for _, text in files]):
        parts.append(np.asarray([bos, *encoding.ids, eos], dtype=np.int64))
    return torch.from_numpy(np.concatenate(parts))


def token_bytes(tokenizer: Tokenizer) -> torch.Tensor:
    """Bytes of text that each token stands for; special tokens stand for none.  # [vocab], float32"""
    lengths = [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    lengths[: len(SPECIALS)] = [0] * len(SPECIALS)
    return torch.tensor(lengths, dtype=torch.float32)


class Crops:
    """Random windows of a token stream, drawn with a seed of their own."""

    def __init__(self, stream: torch.Tensor, device: torch.device, seed: int) -> None:
        self.stream = stream.to(device)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: int, length: int) -> torch.Tensor:
        """``batch`` windows of ``length`` tokens.  # [batch, length], int64"""
        start = torch.randint(len(self.stream) - length, (batch, 1), generator=self.generator)
        return self.stream[(start + torch.arange(length)).to(self.stream.device)]


def held_out_prompts(
    tokenizer: Tokenizer, corpus: Corpus, count: int, continuation: int, lengths: tuple[int, ...], seed: int
) -> list[dict[str, object]]:
    """Prompts cut from held-out files, each with the file's own continuation.

    A prompt starts at the beginning of a line and has about the wanted number of tokens.
    """
    rng = random.Random(seed)
    files = [(path, text) for path, text in corpus.held_out if text.isascii()]
    prompts: list[dict[str, object]] = []
    for i in range(20 * count):
        if len(prompts) == count:
            break
        length = lengths[len(prompts) % len(lengths)]
        path, text = files[i % len(files)]
        lines = text.splitlines(keepends=True)
        ids = tokenizer.encode("".join(lines[rng.randrange(len(lines)) :])).ids
        if len(ids) < length + continuation:
            ids = tokenizer.encode(text).ids
        if len(ids) < length + continuation:
            continue
        prompt = tokenizer.decode(ids[:length])
        prompts.append(
            {
                "id": len(prompts),
                "file": path,
                "prompt_tokens": len(tokenizer.encode(prompt).ids),
                "prompt": prompt,
                "continuation": tokenizer.decode(ids[length : length + continuation]),
            }
        )
    return prompts


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
