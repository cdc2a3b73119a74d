"""Device memory of the requests: the token table, the per-request state, and the paged MLA cache.

Slot s of the cache belongs to page s // page_size. Page 0, slot 0 and request 0 are reserved: padded rows
of a captured graph read and write there.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch

from sglang.srt.layers.triton_kernels import runs_triton
from sglang.srt.mem_cache.penalty_pool import PenaltyPool

logger = logging.getLogger(__name__)


class ReqToTokenPool:
    """Which slot holds the key of position p of request r: `req_to_token[r, p]`.

    Every row holds whole pages: the slots of a page stand side by side, in order, from a multiple of the page
    size on; page 0 stands wherever a request has none. Who reads the first slot of a page knows the others.

    Beside the table stands what a step needs of each request, indexed in the same way, so that a batch is
    nothing but a list of request indices.
    """

    def __init__(
        self,
        size: int,
        max_context_len: int,
        hidden_size: int,
        device: torch.device | str,
        vocab_size: int = 0,  # 0: no request changes its logits
        eos_token_ids: Collection[int] = (),
        page_size: int = 1,  # divides max_context_len
    ) -> None:
        rows = size + 1  # request 0 is the padding
        self.size = size
        self.max_context_len = max_context_len
        in_page = torch.arange(max_context_len, dtype=torch.int32, device=device) % page_size
        self.req_to_token = in_page.repeat(rows, 1)
        # The committed length: tokens whose target KV is in the cache. The last token never is.
        self.seq_lens = torch.ones(rows, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)  # sampled, not yet in the cache
        self.draft_token = torch.zeros(rows, dtype=torch.int64, device=device)  # the first draft of a step
        self.draft_hidden = torch.zeros((rows, hidden_size), device=device)  # float32: feeds draft step 0
        self.temperature = torch.zeros(rows, dtype=torch.float32, device=device)
        self.top_p = torch.ones(rows, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)  # 0: off
        self.min_p = torch.zeros(rows, dtype=torch.float32, device=device)
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.penalties = PenaltyPool(rows, vocab_size, eos_token_ids, device)
        self.free_slots = list(range(size, 0, -1))

    def sampling_params(self, requests: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """temperature, top_p, top_k, min_p and seed of `requests` ([R], int64): [R] each."""
        columns = self.temperature, self.top_p, self.top_k, self.min_p, self.seed
        return tuple(column[requests] for column in columns)

    def load_drafts(self, requests: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """last_token [bs], draft_token [bs] and draft_hidden [bs, hidden] of `requests` [bs], int32."""
        state = self.last_token, self.draft_token, self.draft_hidden
        if runs_triton(requests.device):
            from sglang.srt.layers.triton_kernels.draft_state import load_draft_state

            return load_draft_state(requests, *state)
        return tuple(column.index_select(0, requests) for column in state)

    def keep_drafts(self, requests: torch.Tensor, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Stores the first drafts [bs] of the next step, and what the next drafts start from [bs, hidden]."""
        if runs_triton(requests.device):
            from sglang.srt.layers.triton_kernels.draft_state import keep_draft_state

            keep_draft_state(requests, tokens, hidden_states, self.draft_token, self.draft_hidden)
            return
        indices = requests.long()
        self.draft_token.index_copy_(0, indices, tokens)
        self.draft_hidden.index_copy_(0, indices, hidden_states.float())

    def forget_pages(self, index: int) -> None:
        """The request's row is the padding's again."""
        self.req_to_token[index].copy_(self.req_to_token[0])

    def alloc(self) -> int | None:
        """A free request index, or None."""
        return self.free_slots.pop() if self.free_slots else None

    def free(self, index: int) -> None:
        self.free_slots.append(index)


class MLATokenToKVPool:
    """Latent KV and indexer keys of every layer, paged. Whole tensors, one a layer."""

    stores_rows = True  # a slot of kv_buffer holds a row's latent and rotated key as they are

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        layer_num: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        index_head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.page_size = page_size
        self.size = num_pages * page_size
        self.kv_lora_rank = kv_lora_rank
        slots = (num_pages + 1) * page_size  # page 0 is the padding
        kv_width, kv_dtype = self.kv_format(kv_lora_rank, qk_rope_head_dim, dtype)
        self.kv_buffer = [
            torch.zeros((slots, kv_width), dtype=kv_dtype, device=device) for _ in range(layer_num)
        ]
        self.index_k_buffer = [
            torch.zeros((slots, index_head_dim), dtype=dtype, device=device) for _ in range(layer_num)
        ]
        logger.info(
            "KV cache: %d tokens, %d layer(s), %.1f MiB", self.size, layer_num, self.memory_bytes() / 2**20
        )

    @staticmethod
    def kv_format(kv_lora_rank: int, qk_rope_head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Elements of a slot of `kv_buffer`, and their dtype."""
        return kv_lora_rank + qk_rope_head_dim, dtype

    def set_mla_kv_buffer(
        self, layer_id: int, loc: torch.Tensor, kv_latent: torch.Tensor, k_rope: torch.Tensor
    ) -> None:
        """Writes rows [T, kv_lora_rank] and [T, qk_rope_head_dim] to slots loc [T], int64."""
        buffer = self.kv_buffer[layer_id]
        buffer[:, : self.kv_lora_rank].index_copy_(0, loc, kv_latent)
        buffer[:, self.kv_lora_rank :].index_copy_(0, loc, k_rope)

    def set_index_k_buffer(self, layer_id: int, loc: torch.Tensor, k_index: torch.Tensor) -> None:
        """Writes rows [T, index_head_dim] to slots loc [T], int64."""
        self.index_k_buffer[layer_id].index_copy_(0, loc, k_index)

    def memory_bytes(self) -> int:
        """Of all layers, the padding's page included."""
        return sum(b.numel() * b.element_size() for b in self.kv_buffer + self.index_k_buffer)
