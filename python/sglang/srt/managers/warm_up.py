"""Passes of every kind before the server is ready, so that no request waits for a compiler."""

from __future__ import annotations

from tqdm import tqdm

from sglang.srt.managers.prefill_queue import MAX_PREFILL_TOKENS
from sglang.srt.managers.schedule_batch import GenerationWorker, PrefillChunk, Req
from sglang.srt.sampling.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)
FILTERED = SamplingParams(temperature=1, top_p=0.9, top_k=20, min_p=0.01)


def warm_up(
    worker: GenerationWorker, chunked_prefill_size: int, index_topk: int, captured: int, max_running: int
) -> None:
    """Runs prefills, and decode steps of more than `captured` requests, whose graph is not there, up to
    `max_running`. All are of one request, whose keys lie in the reserved page; nothing of it stays.

    Which kernels a pass launches, and with which tiles and splits, follows from how many rows it has and how
    many keys they see. Triton compiles each kind once for this machine: the next start reads it from disk.
    """
    longest = chunked_prefill_size if chunked_prefill_size > 0 else MAX_PREFILL_TOKENS
    shapes = pass_shapes(min(longest, worker.context_len), worker.context_len, index_topk)
    batches = [1, *(bs for bs in sizes_up_to(max_running) if bs > max(captured, 1))]
    pool = worker.req_to_token_pool
    index = pool.alloc()
    columns = (pool.seq_lens, pool.last_token, pool.draft_token, pool.draft_hidden)
    state = [column[index].clone() for column in columns]
    for rows, keys in tqdm(shapes, desc="warm up prefill", unit="pass"):
        worker.prefill([chunk(index, rows, keys, GREEDY)])
    worker.prefill([chunk(index, 1, 0, FILTERED)])
    for bs in tqdm(batches, desc="warm up decode", unit="batch"):
        for params in (GREEDY, FILTERED):
            # Nobody reads its tokens, so it counts for nothing.
            worker.launch_decode([request(index, int(pool.seq_lens[index]), params)] * bs)
    for column, value in zip(columns, state):
        column[index] = value
    pool.free(index)


def sizes_up_to(longest: int) -> list[int]:
    """One at least for each tile: they change at powers of two. Largest first: its memory serves the rest."""
    powers = {2**k + 1 for k in range(longest.bit_length())}
    return sorted({1, longest} | {size for size in powers if size < longest}, reverse=True)


def pass_shapes(longest: int, context_len: int, index_topk: int) -> list[tuple[int, int]]:
    """(rows, keys before them): rows that see more keys than are selected are scored, and a quarter of these
    is enough to be split among programs."""
    sizes, keys = sizes_up_to(longest), (index_topk, index_topk // 4, 0)
    return [(rows, before) for before in keys for rows in sizes if before + rows <= context_len]


def request(index: int, keys: int, sampling_params: SamplingParams) -> Req:
    return Req("warm-up", [], sampling_params, seed=0, req_pool_idx=index, kv_len=keys)


def chunk(index: int, rows: int, keys: int, sampling_params: SamplingParams) -> PrefillChunk:
    return PrefillChunk(request(index, keys, sampling_params), [0] * rows, None)
