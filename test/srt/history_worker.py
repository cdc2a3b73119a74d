"""A worker without a model: the next token is a hash of all tokens before it, read back from the cache.

It keeps each token in the slot that the page table names, as a model keeps keys, and reads the whole
history through the table in every step. A wrong table, a page that two requests write, a stale prefix, a
wrong length or a wrong sampling state therefore shows up as a wrong token.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import PrefillChunk, Req, StepOutput
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.sampling.token_logprob import TokenLogprob

POISON = -7


@dataclass(frozen=True)
class Sampling:
    """What the pool holds of a request's sampling; greedy where the temperature is 0."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int

    @classmethod
    def of(cls, params: SamplingParams, seed: int) -> Sampling:
        values = torch.tensor(
            [params.temperature, params.top_p, params.min_p]
        ).tolist()  # float32, as the pool
        return cls(values[0], values[1], max(params.top_k, 0), values[2], seed)


def next_token(history: Iterable[int], sampling: Sampling, vocab_size: int) -> int:
    randomness = "" if sampling.temperature == 0 else str(sampling)
    return zlib.crc32(f"{list(history)}{randomness}".encode()) % vocab_size


def continuation(prompt: list[int], sampling: Sampling, count: int, vocab_size: int) -> list[int]:
    """What any scheduler must produce."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, sampling, vocab_size))
    return tokens[len(prompt) :]


@dataclass
class Launched:
    """A step whose tokens the scheduler has not seen."""

    worker: HistoryWorker
    output: StepOutput

    def read(self) -> StepOutput:
        self.worker.in_flight -= 1
        return self.output


class HistoryWorker:
    """Plain with lookahead 1; with more it accepts 1 .. lookahead tokens a step and spoils the rest."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        lookahead: int = 1,
        max_running_requests: int = 8,
        context_len: int = 128,
        vocab_size: int = 97,
        eos_token_ids: frozenset[int] = frozenset(),
        overlaps: bool = False,
    ) -> None:
        self.num_pages, self.page_size, self.lookahead = num_pages, page_size, lookahead
        self.context_len, self.vocab_size, self.eos_token_ids = context_len, vocab_size, eos_token_ids
        self.overlaps = overlaps
        self.in_flight = 0  # steps that are launched and not read
        self.largest_in_flight = 0
        width = -(-(context_len + lookahead) // page_size) * page_size
        self.req_to_token_pool = ReqToTokenPool(max_running_requests, width, 1, "cpu", page_size=page_size)
        slots = (num_pages + 1) * page_size
        self.kv = torch.full((slots,), POISON)  # the token of each slot
        self.draft_kv = torch.full((slots,), POISON)  # the token after it: what the draft layer's key holds
        self.prefilled_tokens = 0
        self.largest_batch = 0

    def _check_pages(self) -> None:
        """What `MetadataInputs.whole_pages` says of the pool, in every row."""
        pages = self.req_to_token_pool.req_to_token.unflatten(1, (-1, self.page_size))
        first = pages[:, :, :1]
        assert (first % self.page_size == 0).all()
        assert (pages == first + torch.arange(self.page_size)).all()

    def prefill(self, chunks: list[PrefillChunk]) -> StepOutput:
        self._check_pages()
        pool, tokens, prompt_logprobs = self.req_to_token_pool, [], []
        for chunk in chunks:
            index, start, end = chunk.req.req_pool_idx, chunk.req.kv_len, chunk.req.kv_len + len(chunk.tokens)
            assert chunk.tokens and pool.seq_lens[index] == start
            self.prefilled_tokens += len(chunk.tokens)
            self._write(index, start, chunk.tokens)
            history = self._read(index, end)
            new = next_token(history, self._sampling(index), self.vocab_size)
            new = new if chunk.next_token is None else chunk.next_token
            self._write_draft(index, start, [*chunk.tokens[1:], new])
            pool.seq_lens[index], pool.last_token[index] = end, new
            tokens.append([new] if chunk.next_token is None else [])
            known = [TokenLogprob(history[0], None, [])] if start == 0 else []
            targets = [*chunk.tokens[1:], *([] if chunk.next_token is None else [new])]
            prompt_logprobs.append(known + [logprob_of(token) for token in targets])
        return StepOutput(tokens, self._logprobs(tokens), prompt_logprobs)

    def launch_decode(self, reqs: list[Req]) -> Launched:
        """All of it happens at once: what comes later on the host comes later on the device, too."""
        assert self.in_flight == 0 or (self.overlaps and self.in_flight == 1)
        output = self.decode(reqs)
        self.in_flight += 1
        self.largest_in_flight = max(self.largest_in_flight, self.in_flight)
        return Launched(self, output)

    def decode(self, reqs: list[Req]) -> StepOutput:
        self._check_pages()
        pool, tokens = self.req_to_token_pool, []
        self.largest_batch = max(self.largest_batch, len(reqs))
        for req in reqs:
            index = req.req_pool_idx
            length, last = int(pool.seq_lens[index]), int(pool.last_token[index])
            # What the host has not read yet it does not count.
            assert req.kv_len + self.in_flight <= length <= req.kv_len + self.in_flight * self.lookahead
            history = [*self._read(index, length), last]
            if self.lookahead > 1:
                drafted = self.draft_kv[self._slots(index, 0, length)].tolist()
                assert drafted == history[1:], "the draft layer's keys are those of other tokens"
            count = 1 + zlib.crc32(str(history).encode()) % self.lookahead  # accepted drafts and the bonus
            new = continuation(history, self._sampling(index), count, self.vocab_size)
            spoiled = [POISON] * (self.lookahead - count)
            self._write(index, length, [last, *new[:-1], *spoiled])
            self._write_draft(index, length, [*new, *spoiled])
            pool.seq_lens[index], pool.last_token[index] = length + count, new[-1]
            tokens.append(new)
        return StepOutput(tokens, self._logprobs(tokens))

    def internal_state(self) -> dict[str, Any]:
        return {"avg_spec_accept_length": None}

    def _slots(self, index: int, start: int, end: int) -> torch.Tensor:
        slots = self.req_to_token_pool.req_to_token[index, start:end].long()
        assert len(slots) == end - start, "the table is too narrow"
        assert (slots >= self.page_size).all(), "position without a page"
        assert (slots % self.page_size == torch.arange(start, end) % self.page_size).all()
        return slots

    def _read(self, index: int, length: int) -> list[int]:
        return self.kv[self._slots(index, 0, length)].tolist()

    def _write(self, index: int, start: int, tokens: list[int]) -> None:
        self.kv[self._slots(index, start, start + len(tokens))] = torch.tensor(tokens)

    def _write_draft(self, index: int, start: int, tokens: list[int]) -> None:
        self.draft_kv[self._slots(index, start, start + len(tokens))] = torch.tensor(tokens)

    def _sampling(self, index: int) -> Sampling:
        pool = self.req_to_token_pool
        return Sampling(
            *(
                getattr(pool, name)[index].item()
                for name in ("temperature", "top_p", "top_k", "min_p", "seed")
            )
        )

    @staticmethod
    def _logprobs(tokens: list[list[int]]) -> list[list[TokenLogprob]]:
        return [[logprob_of(token) for token in row] for row in tokens]


def logprob_of(token: int) -> TokenLogprob:
    return TokenLogprob(token, -float(token), [(token, -float(token)), (0, -99.0)])
