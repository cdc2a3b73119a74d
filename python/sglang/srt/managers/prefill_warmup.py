"""Prefill passes of every kind before the server is ready, so that no request waits for a compiler."""

from __future__ import annotations

from tqdm import tqdm

from sglang.srt.managers.prefill_queue import MAX_PREFILL_TOKENS
from sglang.srt.managers.schedule_batch import GenerationWorker, PrefillChunk, Req
from sglang.srt.sampling.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)
FILTERED = SamplingParams(temperature=1, top_p=0.9, top_k=20, min_p=0.01)


def warm_up_prefill(worker: GenerationWorker, chunked_prefill_size: int, index_topk: int) -> None:
    """Runs them as the padding's request, whose keys lie in the reserved page, and leaves its state alone.

    Which kernels a pass launches, and with which tiles and splits, follows from how many rows it has and how
    many keys they see. Triton compiles each kind once for this machine: the next start reads it from disk.
    """
    longest = chunked_prefill_size if chunked_prefill_size > 0 else MAX_PREFILL_TOKENS
    shapes = pass_shapes(min(longest, worker.context_len), worker.context_len, index_topk)
    pool = worker.req_to_token_pool
    columns = (pool.seq_lens, pool.last_token, pool.draft_token, pool.draft_hidden)
    before = [column[0].clone() for column in columns]
    for rows, keys in tqdm(shapes, desc="warm up prefill", unit="pass"):
        run_pass(worker, rows, keys, GREEDY)
    run_pass(worker, 1, 0, FILTERED)
    for column, value in zip(columns, before):
        column[0] = value


def pass_shapes(longest: int, context_len: int, index_topk: int) -> list[tuple[int, int]]:
    """(rows, keys before them): tiles change at powers of two; rows that see more keys than are selected are
    scored, and a quarter of these is enough to be split among programs. Largest first, for its memory."""
    powers = {2**k + 1 for k in range(longest.bit_length())}
    sizes = sorted({1, longest} | {rows for rows in powers if rows < longest}, reverse=True)
    keys = (index_topk, index_topk // 4, 0)
    return [(rows, before) for before in keys for rows in sizes if before + rows <= context_len]


def run_pass(worker: GenerationWorker, rows: int, keys: int, sampling_params: SamplingParams) -> None:
    req = Req("warm-up", [], sampling_params, seed=0, req_pool_idx=0, kv_len=keys)
    worker.prefill([PrefillChunk(req, [0] * rows, None)])
