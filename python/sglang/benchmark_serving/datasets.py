"""The prompts of a run."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import keyword
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sglang.srt.tokenizer

WORDS = keyword.kwlist
MIN_SHAREGPT_TOKENS = 2  # of a prompt and of its reply; shorter ones are left out, as SGLang does


@dataclass(frozen=True)
class Sample:
    prompt: str | list[int]
    max_tokens: int


def load_samples(args: argparse.Namespace, tokenizer: Any | None, takes_ids: bool) -> list[Sample]:
    """`--num-prompts` samples. Raises ValueError and OSError that name the flag, the file or its line."""
    samples = list(itertools.islice(DATASETS[args.dataset_name](args, tokenizer), args.num_prompts))
    if not samples:
        raise ValueError(f"{args.dataset_path} holds no conversation that can be used")
    if len(samples) < args.num_prompts:
        print(f"{args.dataset_path} gives {len(samples)} prompts only", file=sys.stderr)
    if args.apply_chat_template:
        samples = [replace(s, prompt=_in_template(s.prompt, tokenizer)) for s in samples]
    if args.tokenize_prompt and takes_ids:
        samples = [replace(s, prompt=_tokens(s.prompt, _needed(tokenizer, args))) for s in samples]
    if not takes_ids:
        samples = [replace(s, prompt=_text(s.prompt, tokenizer)) for s in samples]
    return samples


def _random(args: argparse.Namespace, tokenizer: Any | None) -> Iterator[Sample]:
    """Random words: token ids of exactly the length with a tokenizer; without one the length counts words."""
    rng = random.Random(args.seed)
    while True:
        count, output_len = (
            _length(rng, args, args.random_input_len),
            _length(rng, args, args.random_output_len),
        )
        text = " ".join(rng.choices(WORDS, k=count))
        yield Sample(text if tokenizer is None else _tokens(text, tokenizer)[:count], output_len)


def _random_ids(args: argparse.Namespace, tokenizer: Any | None) -> Iterator[Sample]:
    """Token ids at random, special ones left out."""
    rng, tokenizer = random.Random(args.seed), _needed(tokenizer, args)
    ids = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.all_special_ids))
    while True:
        count, output_len = (
            _length(rng, args, args.random_input_len),
            _length(rng, args, args.random_output_len),
        )
        yield Sample(rng.choices(ids, k=count), output_len)


def _length(rng: random.Random, args: argparse.Namespace, longest: int) -> int:
    """Uniform in [ratio * longest, longest]."""
    return rng.randint(max(1, int(longest * args.random_range_ratio)), longest)


def _sharegpt(args: argparse.Namespace, tokenizer: Any | None) -> Iterator[Sample]:
    """First turn and the length of the reply to it, of conversations in random order."""
    tokenizer = _needed(tokenizer, args)
    conversations = [turns for _, record in _records(args.dataset_path) if (turns := _turns(record))]
    random.Random(args.seed).shuffle(conversations)
    for prompt, reply in conversations:
        prompt_len = len(_tokens(prompt, tokenizer))
        output_len = args.sharegpt_output_len or len(_tokens(reply, tokenizer))
        if min(prompt_len, output_len) < MIN_SHAREGPT_TOKENS:
            continue
        if args.sharegpt_context_len is None or prompt_len + output_len <= args.sharegpt_context_len:
            yield Sample(prompt, output_len)


def _custom(args: argparse.Namespace, tokenizer: Any | None) -> Iterator[Sample]:
    """The file's lines in order, from the start again where it is shorter. A line has "prompt" (a string or
    token ids) and optionally "max_tokens", or "conversations" as ShareGPT has them."""
    samples = []
    for number, record in _records(args.dataset_path):
        output_len = args.sharegpt_output_len
        if "prompt" in record:
            samples.append(Sample(record["prompt"], record.get("max_tokens", args.random_output_len)))
        elif turns := _turns(record):
            if output_len is None and tokenizer is not None:
                output_len = max(1, len(_tokens(turns[1], tokenizer)))
            samples.append(Sample(turns[0], output_len or args.random_output_len))
        else:
            raise ValueError(f"{args.dataset_path}: line {number} has neither 'prompt' nor 'conversations'")
    return itertools.cycle(samples)


DATASETS: dict[str, Callable[[argparse.Namespace, Any | None], Iterator[Sample]]] = {
    "random": _random,
    "random-ids": _random_ids,
    "sharegpt": _sharegpt,
    "custom": _custom,
}


def _records(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """The objects of a JSON list or of a JSONL file, numbered from 1."""
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is neither a JSON list nor JSONL: {error}") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: entry {number} is no object: {str(record)[:80]}")
        yield number, record


def _turns(record: dict[str, Any]) -> tuple[str, str] | None:
    """The first two turns of a conversation; None where it has fewer."""
    turns = record.get("conversations") or record.get("conversation") or []
    texts = [turn.get("value", turn.get("content")) for turn in turns[:2]]
    return (texts[0], texts[1]) if len(texts) == 2 and all(isinstance(t, str) for t in texts) else None


def _needed(tokenizer: Any | None, args: argparse.Namespace) -> Any:
    if tokenizer is None:
        raise ValueError(f"--dataset-name {args.dataset_name} needs --tokenizer: the server's is not here")
    return tokenizer


def _tokens(prompt: str | list[int], tokenizer: Any) -> list[int]:
    return tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt


def _text(prompt: str | list[int], tokenizer: Any | None) -> str:
    if isinstance(prompt, list) and tokenizer is None:
        raise ValueError("this endpoint takes text: --tokenizer is needed to make text of token ids")
    return tokenizer.decode(prompt) if isinstance(prompt, list) else prompt


def _in_template(prompt: str | list[int], tokenizer: Any | None) -> str:
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError("--apply-chat-template needs a --tokenizer with a chat template")
    messages = [{"role": "user", "content": _text(prompt, tokenizer)}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@functools.cache
def load_tokenizer(name: str | None) -> Any | None:
    if name is None:
        return None
    return sglang.srt.tokenizer.load_tokenizer(name, local_files_only=False)
