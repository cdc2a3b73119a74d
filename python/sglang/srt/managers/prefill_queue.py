"""The requests that wait for their prefill, and what the next pass computes of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Set

from sglang.srt.managers.schedule_batch import PrefillChunk, Req
from sglang.srt.mem_cache.radix_cache import TreeNode
from sglang.srt.mem_cache.request_memory import RequestMemory

MAX_PREFILL_TOKENS = 16384  # of several prompts in one pass where prompts are not cut into chunks

PageKey = tuple[TreeNode, tuple[int, ...]]  # a page of the cache: its parent and its key


class PrefillQueue:
    """Requests in the order in which they get memory. At most one, `partial`, has it and is between two
    chunks: it goes on first in the next pass."""

    def __init__(
        self,
        memory: RequestMemory,
        lookahead: int,
        chunked_prefill_size: int,
        fail: Callable[[Req, Exception], None],
    ) -> None:
        """`chunked_prefill_size` in tokens; 0 and below: prompts are not cut. `fail` ends a request that
        cannot be admitted and takes it out of the queue."""
        self.memory = memory
        self.lookahead = lookahead
        self.chunked_prefill_size = chunked_prefill_size
        self.fail = fail
        self.waiting: deque[Req] = deque()
        self.partial: Req | None = None
        self.num_prompt_tokens = 0  # of admitted requests
        self.num_cached_tokens = 0

    @property
    def cache_hit_rate(self) -> float:
        return self.num_cached_tokens / max(self.num_prompt_tokens, 1)

    def next_chunks(self, num_running: int) -> list[PrefillChunk]:
        """The partial request first, then those that wait, in their order, while tokens and memory last."""
        whole = self.chunked_prefill_size <= 0
        budget = MAX_PREFILL_TOKENS if whole else self.chunked_prefill_size
        chunks: list[PrefillChunk] = []
        coming: set[PageKey] = set()  # what the chunks will put into the cache first
        shared: list[Req] = []  # lack such a page: better off in the next pass, when it is there
        while budget > 0:
            if self.partial is not None:
                req, self.partial = self.partial, None
            elif not self.waiting:
                break
            elif coming and self.next_page(self.waiting[0]) in coming:
                shared.append(self.waiting.popleft())
                continue
            else:
                req = self.waiting[0]
                try:
                    admitted = self.admit(req, num_running + len(chunks))
                except Exception as error:
                    self.fail(req, error)
                    continue
                if not admitted:
                    break
                self.waiting.popleft()
            if (page := self.next_page(req)) is not None:
                coming.add(page)
            chunk = next_chunk(req, req.seqlen if whole else budget)
            budget -= len(chunk.tokens)
            chunks.append(chunk)
        self.waiting.extendleft(reversed(shared))
        return chunks

    def remove(self, reqs: Set[Req]) -> None:
        """Takes out what waits. One is usually the first; of many each would be looked for among all."""
        if len(reqs) == 1:
            self.waiting.remove(*reqs)
        elif reqs:
            self.waiting = deque(req for req in self.waiting if req not in reqs)

    def next_page(self, req: Req) -> PageKey | None:
        """The first full page of a request that the cache does not have; None: it would not look for one."""
        cache = self.memory.cache
        if not cache.enabled or req.logprob_start_len >= 0:
            return None
        tokens = req.token_ids
        node = req.cache_node or cache.match(tokens)
        key = cache.key(tokens, node.depth)
        return (node, key) if len(key) == cache.page_size + cache.lookahead_tokens else None

    def admit(self, req: Req, headroom: int) -> bool:
        """Leaves a page for each request before it, or the next decode steps would retract this one."""
        if not self.memory.admit(req, req.seqlen + self.lookahead, headroom):
            return False
        if not req.output_ids:  # not after a retraction
            req.cached_tokens = req.kv_len
            req.queue_time = time.perf_counter() - req.arrival
            self.num_prompt_tokens += len(req.input_ids)
            self.num_cached_tokens += req.kv_len
        return True


def next_chunk(req: Req, budget: int) -> PrefillChunk:
    tokens = req.token_ids
    end = min(req.kv_len + budget, len(tokens))
    return PrefillChunk(req, tokens[req.kv_len : end], tokens[end] if end < len(tokens) else None)
