"""What a verification decides, and how far it moves the requests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs


@triton.jit
def _accept_kernel(
    tokens,  # [bs, D], int64: the target's
    drafts,  # [bs, D - 1], int64
    requests,  # [bs], int32
    seq_lens,  # [bs], int32
    output,  # [bs, D + 1], int64
    accept_lens,  # [bs], int32
    extend_seq_lens,  # [bs], int32
    last_rows,  # [bs], int64
    pool_seq_lens,  # [pool], int32
    pool_last_token,  # [pool], int64
    drafts_stride,
    output_stride,
    ROWS: tl.constexpr,  # D
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one request."""
    wait_for_inputs(DEPENDENT)
    i = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    token = tl.load(tokens + i * ROWS + at, mask=at < ROWS, other=0)
    draft = tl.load(drafts + i * drafts_stride + at, mask=at < ROWS - 1, other=0)
    # Right up to the first draft that the target does not say; after the last right one comes the bonus.
    right = tl.min(tl.where((at < ROWS - 1) & (token != draft), at, ROWS - 1), axis=0)
    request = tl.load(requests + i).to(tl.int64)
    accepted = tl.where(request > 0, right + 1, 0)
    length = tl.load(seq_lens + i) + accepted
    tl.store(output + i * output_stride + at, token, mask=at < ROWS)
    tl.store(output + i * output_stride + ROWS, accepted.to(tl.int64))
    tl.store(accept_lens + i, accepted)
    tl.store(extend_seq_lens + i, length)
    tl.store(last_rows + i, i * ROWS + tl.where(request > 0, right, 0))
    if request > 0:
        tl.store(pool_seq_lens + request, length)
        tl.store(pool_last_token + request, tl.sum(tl.where(at == right, token, 0), axis=0))


def accept(
    tokens: torch.Tensor,  # [bs, D], int64
    drafts: torch.Tensor,  # [bs, D - 1], int64
    requests: torch.Tensor,  # [bs], int32: 0 is padding, which accepts nothing
    seq_lens: torch.Tensor,  # [bs], int32
    output: torch.Tensor,  # [bs, D + 1], int64: the tokens, then how many count
    accept_lens: torch.Tensor,  # [bs], int32
    extend_seq_lens: torch.Tensor,  # [bs], int32
    last_rows: torch.Tensor,  # [bs], int64: of the bs * D rows, the last accepted ones
    pool_seq_lens: torch.Tensor,  # [pool], int32
    pool_last_token: torch.Tensor,  # [pool], int64
) -> None:
    """As `count_accepted`; writes the last six."""
    bs, rows = tokens.shape
    _accept_kernel[(bs,)](
        tokens.contiguous(),
        drafts,
        requests,
        seq_lens,
        output,
        accept_lens,
        extend_seq_lens,
        last_rows,
        pool_seq_lens,
        pool_last_token,
        drafts.stride(0),
        output.stride(0),
        ROWS=rows,
        BLOCK=triton.next_power_of_2(rows),
        num_warps=1,
        **dependent_launch(tokens.device),
    )
