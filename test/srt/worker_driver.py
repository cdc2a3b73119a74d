"""Drives a worker without a scheduler: contiguous pages, all prompts at once, a fixed number of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import PrefillChunk, Req
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.managers.worker_factory import create_worker
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs


def make_worker(model: Path, **args: Any) -> TpModelWorker:
    options = {"max_running_requests": 8, "max_total_tokens": 8192, "device": "cpu", "context_length": 512}
    options["skip_server_warmup"] = True
    return create_worker(ServerArgs(model_path=str(model), **(options | args)))


def speculative(steps: int, **args: Any) -> dict[str, Any]:
    return {"speculative_algorithm": "NEXTN", "speculative_num_steps": steps, **args}


def generate(
    worker: TpModelWorker,
    prompts: Sequence[list[int]],
    new_tokens: int,
    temperatures: Sequence[float] | None = None,
) -> list[list[int]]:
    """The first `new_tokens` tokens after each prompt, by default the greedy ones; seeds are 0, 1, ..."""
    pages = itertools.count(1)
    each = enumerate(zip(prompts, temperatures or [0.0] * len(prompts), strict=True))
    reqs = [_admit(worker, i, prompt, new_tokens, t, pages) for i, (prompt, t) in each]
    output = worker.prefill([PrefillChunk(req, req.input_ids, None) for req in reqs])
    for req, tokens in zip(reqs, output.tokens):
        req.kv_len, req.output_ids = len(req.input_ids), list(tokens)
    while min(len(req.output_ids) for req in reqs) < new_tokens:
        for req, tokens in zip(reqs, worker.decode(reqs).tokens):
            req.kv_len += len(tokens)
            req.output_ids += tokens
    for req in reqs:
        worker.req_to_token_pool.free(req.req_pool_idx)
    return [req.output_ids[:new_tokens] for req in reqs]


def _admit(
    worker: TpModelWorker,
    i: int,
    prompt: list[int],
    new_tokens: int,
    temperature: float,
    pages: itertools.count,
) -> Req:
    pool, page_size = worker.req_to_token_pool, worker.page_size
    req = Req(f"r{i}", prompt, SamplingParams(temperature=temperature), seed=i)
    req.req_pool_idx = index = pool.alloc()
    # A request that finished early goes on until all have finished.
    room = len(prompt) + worker.lookahead * (new_tokens + 1)
    for column in range(0, min(room, pool.max_context_len), page_size):
        first = next(pages) * page_size
        pool.req_to_token[index, column : column + page_size] = torch.arange(
            first, first + page_size, dtype=torch.int32, device=pool.req_to_token.device
        )
    pool.temperature[index], pool.seed[index] = temperature, req.seed
    return req
