"""One forward pass: its mode, its rows and where their keys and values go."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool, ReqToTokenPool


class ForwardMode(IntEnum):
    """What a forward pass is for; the number of query rows of each request follows from it."""

    EXTEND = auto()  # prompt tokens, any number a request
    DECODE = auto()  # one row a request
    TARGET_VERIFY = auto()  # D = speculative_num_draft_tokens rows a request
    DRAFT_EXTEND = auto()  # D rows a request, of which the first `accept_lens[i]` count

    def is_extend(self) -> bool:
        return self is ForwardMode.EXTEND


@dataclass
class ForwardBatch:
    """T rows of bs requests, in request order: each brings a key, and a query unless `last_rows` says whose.

    `seq_lens` follows SGLang: EXTEND and DECODE count the tokens of this pass; TARGET_VERIFY holds the
    committed lengths (the D draft rows come on top); DRAFT_EXTEND counts the accepted tokens.
    """

    forward_mode: ForwardMode
    batch_size: int
    input_ids: torch.Tensor  # [T], int64
    positions: torch.Tensor  # [T], int64
    out_cache_loc: torch.Tensor  # [T], int64: slot of each row's key; 0 for rows that do not count
    req_pool_indices: torch.Tensor  # [bs], int32
    seq_lens: torch.Tensor  # [bs], int32
    req_to_token_pool: ReqToTokenPool
    token_to_kv_pool: MLATokenToKVPool
    attn_backend: AttentionBackend
    seq_lens_cpu: list[int] | None = None  # the host's mirror of seq_lens, where the host has one
    row_requests: torch.Tensor | None = None  # [T], int64: EXTEND: the request of each row
    last_rows: torch.Tensor | None = None  # [bs], int64: EXTEND: where these alone are asked for; None: all
    accept_lens: torch.Tensor | None = None  # [bs], int32: DRAFT_EXTEND
    hidden_states: torch.Tensor | None = None  # [T, hidden]: what the NextN layer is fed with, else None
    rotation: torch.Tensor | None = None  # [T, 1, rope / 2], complex64: of the positions, where it is known
