"""The device memory that one request holds: a row of the request pool, and its pages.

Every page is in exactly one of three places: free in the allocator, in the prefix cache, or owned by one
request. A request reads the cache's pages on its locked path and owns the rest of `req.pages`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from sglang.srt.mem_cache.allocator import PageAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class RequestMemory:
    """Gives requests their memory and takes it back."""

    def __init__(self, pool: ReqToTokenPool, allocator: PageAllocator, cache: RadixCache) -> None:
        self.pool = pool
        self.allocator = allocator
        self.cache = cache
        self.page_size = cache.page_size

    def pages_for(self, num_positions: int) -> int:
        return -(-num_positions // self.page_size)

    @property
    def obtainable_pages(self) -> int:
        return self.allocator.available + self.cache.evictable_pages

    def admit(self, req: Req, num_positions: int, headroom: int) -> bool:
        """Gives a request its row, the cached prefix of its tokens, and pages for `num_positions`.

        False, and nothing has changed, where no row is free or fewer than `headroom` pages would be left; and
        nothing has changed where it raises.
        A request that wants its prompt's logprobs computes all of it and takes nothing from the cache.
        """
        if not self.pool.free_slots:
            return False
        cache = self.cache
        node = cache.root
        if req.logprob_start_len < 0:
            # One token must remain to be computed: its logits give the next one.
            node = cache.match(req.token_ids[: req.seqlen - 1 + cache.lookahead_tokens])
        cache.lock(node)
        if self.pages_for(num_positions) - node.depth + headroom > self.obtainable_pages:
            cache.unlock(node)
            return False
        req.req_pool_idx = self.pool.alloc()
        req.cache_node = node
        req.pages = node.pages()
        req.kv_len = node.depth * self.page_size
        try:
            self._write_table(req, 0)
            self._write_state(req)
            fits = self.reserve(req, num_positions)
            assert fits, "pages were counted as obtainable but could not be had"
        except Exception:
            self.release(req)
            raise
        return True

    def reserve(self, req: Req, num_positions: int) -> bool:
        """Makes sure that the request has pages for `num_positions`. False where memory does not suffice."""
        missing = self.pages_for(num_positions) - len(req.pages)
        if missing <= 0:
            return True
        if missing > self.obtainable_pages:
            return False
        shortage = missing - self.allocator.available
        if shortage > 0:
            self.allocator.free(self.cache.evict(shortage))
        pages = self.allocator.alloc(missing)
        assert pages is not None, "an unlocked page of the cache could not be evicted"
        first = len(req.pages)
        req.pages += pages
        self._write_table(req, first)
        return True

    def share(self, req: Req) -> None:
        """Puts the request's full pages into the cache, where others find them while it still runs."""
        cache = self.cache
        computed = min(req.kv_len, req.seqlen - cache.lookahead_tokens)  # tokens whose key is known
        assert req.cache_node is not None
        node = cache.extend(req.cache_node, req.token_ids, req.pages[: computed // self.page_size])
        if node is not req.cache_node:
            cache.lock(node)
            cache.unlock(req.cache_node)
            req.cache_node = node

    def release(self, req: Req) -> None:
        """Takes back all that the request holds; what others can use stays in the cache."""
        self.share(req)
        assert req.cache_node is not None and req.req_pool_idx is not None
        cached = set(req.cache_node.pages())
        self.allocator.free([page for page in req.pages if page not in cached])
        self.cache.unlock(req.cache_node)
        self.pool.forget_pages(req.req_pool_idx)
        self.pool.seq_lens[req.req_pool_idx].fill_(1)
        self.pool.free(req.req_pool_idx)
        req.req_pool_idx, req.cache_node, req.pages, req.kv_len = None, None, [], 0

    def flush(self) -> None:
        """Empties the cache of everything that is not locked."""
        self.allocator.free(self.cache.evict(self.cache.num_pages))

    @property
    def is_balanced(self) -> bool:
        """Whether the counts are right while no request holds memory: `check` in constant time.

        A lost page and a page held twice would balance, but the allocator refuses to free a page twice.
        """
        return (
            self.obtainable_pages == self.allocator.num_pages
            and self.cache.locked_pages == 0
            and len(self.pool.free_slots) == self.pool.size
        )

    def check(self) -> str | None:
        """What is wrong while no request holds memory, in words; None when every page is accounted for."""
        faults: list[str] = []
        seen = Counter(self.allocator.free_pages)
        seen.update(node.page for node in self.cache.nodes())
        if twice := sorted(page for page, count in seen.items() if count > 1):
            faults.append(f"pages held twice: {twice}")
        if lost := sorted(set(range(1, self.allocator.num_pages + 1)) - seen.keys()):
            faults.append(f"pages lost: {lost}")
        if locked := sorted(node.page for node in self.cache.nodes() if node.ref_count):
            faults.append(f"cached pages still locked: {locked}")
        if sorted(self.pool.free_slots) != list(range(1, self.pool.size + 1)):
            faults.append(f"free request slots: {sorted(self.pool.free_slots)} of 1 .. {self.pool.size}")
        return "; ".join(faults) or None

    def _write_state(self, req: Req) -> None:
        """Sets the request's row in the pool's tensors; each assignment is one fill on the device."""
        pool, index, params = self.pool, req.req_pool_idx, req.sampling_params
        row = slice(index, index + 1)  # to a single element torch copies from the host, and waits for it
        pool.seq_lens[row] = req.kv_len
        pool.temperature[row] = params.temperature
        pool.top_p[row] = params.top_p
        pool.top_k[row] = max(params.top_k, 0)
        pool.min_p[row] = params.min_p
        pool.seed[row] = req.seed
        pool.penalties.set_request(index, params, len(req.input_ids), req.output_ids)

    def _write_table(self, req: Req, first: int) -> None:
        """Writes the slots of req.pages[first:] into the request's row of req_to_token."""
        row = self.pool.req_to_token[req.req_pool_idx]  # [max_context_len], int32
        column = first * self.page_size
        for page, count in page_runs(req.pages[first:]):
            width = min(count * self.page_size, len(row) - column)
            slot = page * self.page_size
            torch.arange(slot, slot + width, dtype=torch.int32, out=row[column : column + width])
            column += width


def page_runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first page, count) of each run of consecutive pages: [4, 5, 6, 2] gives (4, 3), (2, 1)."""
    start = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield pages[start], i - start
            start = i
