"""What a request keeps between its steps for the drafts: out of the pool at once, and into it at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs

BLOCK = 1024


@triton.jit
def _load_kernel(
    requests,  # [bs], int32
    last_token,  # [pool], int64
    draft_token,  # [pool], int64
    draft_hidden,  # [pool, hidden], float32
    tokens,  # [2, bs], int64
    hidden_states,  # [bs, hidden], float32
    hidden,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK elements of one request."""
    wait_for_inputs(DEPENDENT)
    i, bs = tl.program_id(0), tl.num_programs(0)
    request = tl.load(requests + i).to(tl.int64)
    if tl.program_id(1) == 0:
        tl.store(tokens + i, tl.load(last_token + request))
        tl.store(tokens + bs + i, tl.load(draft_token + request))
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(draft_hidden + request * hidden + at, mask=at < hidden, other=0.0)
    tl.store(hidden_states + i.to(tl.int64) * hidden + at, value, mask=at < hidden)


def load_draft_state(
    requests: torch.Tensor,  # [bs], int32
    last_token: torch.Tensor,  # [pool], int64
    draft_token: torch.Tensor,  # [pool], int64
    draft_hidden: torch.Tensor,  # [pool, hidden], float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last tokens [bs], first drafts [bs] and hidden states [bs, hidden] of the requests, out of the pool."""
    bs, hidden = requests.shape[0], draft_hidden.shape[1]
    tokens = torch.empty((2, bs), dtype=torch.int64, device=requests.device)
    hidden_states = torch.empty((bs, hidden), dtype=torch.float32, device=requests.device)
    _load_kernel[(bs, triton.cdiv(hidden, BLOCK))](
        requests,
        last_token,
        draft_token,
        draft_hidden,
        tokens,
        hidden_states,
        hidden,
        BLOCK=BLOCK,
        **dependent_launch(requests.device),
    )
    return tokens[0], tokens[1], hidden_states


@triton.jit
def _keep_kernel(
    requests,  # [bs], int32
    tokens,  # [bs], int64
    hidden_states,  # [bs, hidden]
    draft_token,  # [pool], int64
    draft_hidden,  # [pool, hidden], float32
    hidden,
    hidden_stride,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK elements of one request."""
    wait_for_inputs(DEPENDENT)
    i = tl.program_id(0).to(tl.int64)
    request = tl.load(requests + i).to(tl.int64)
    if tl.program_id(1) == 0:
        tl.store(draft_token + request, tl.load(tokens + i))
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(hidden_states + i * hidden_stride + at, mask=at < hidden, other=0.0).to(tl.float32)
    tl.store(draft_hidden + request * hidden + at, value, mask=at < hidden)


def keep_draft_state(
    requests: torch.Tensor,  # [bs], int32
    tokens: torch.Tensor,  # [bs], int64
    hidden_states: torch.Tensor,  # [bs, hidden], float32 or bfloat16
    draft_token: torch.Tensor,  # [pool], int64: written
    draft_hidden: torch.Tensor,  # [pool, hidden], float32: written
) -> None:
    """Stores the first drafts of the next step and what they were made of."""
    bs, hidden = hidden_states.shape
    assert hidden_states.stride(1) == tokens.stride(0) == 1
    _keep_kernel[(bs, triton.cdiv(hidden, BLOCK))](
        requests,
        tokens,
        hidden_states,
        draft_token,
        draft_hidden,
        hidden,
        hidden_states.stride(0),
        BLOCK=BLOCK,
        **dependent_launch(requests.device),
    )
