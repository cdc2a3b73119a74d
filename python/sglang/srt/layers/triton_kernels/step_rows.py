"""Where the rows of a decode step are: positions, slots and rotations of D rows of every request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.srt.layers.triton_kernels.launch import dependent_launch, wait_for_inputs


@triton.jit
def _step_rows_kernel(
    requests,  # [bs], int32
    seq_lens,  # [bs], int32
    accept_lens,  # [bs], int32: rows from there on have slot 0; None: all have theirs
    req_to_token,  # [pool, width], int32
    table,  # [positions, pairs, 2], float32
    positions,  # [bs, D], int64
    slots,  # [bs, D], int64
    rotation,  # [bs, D, pairs, 2], float32
    pairs,
    width,
    BLOCK: tl.constexpr,  # >= 2 * pairs
    DEPENDENT: tl.constexpr,
):
    """One program: one row."""
    wait_for_inputs(DEPENDENT)
    request, row = tl.program_id(0), tl.program_id(1)
    at = request.to(tl.int64) * tl.num_programs(1) + row
    position = tl.load(seq_lens + request).to(tl.int64) + row
    index = tl.load(requests + request).to(tl.int64)
    tl.store(positions + at, position)
    slot = tl.load(req_to_token + index * width + position).to(tl.int64)
    if accept_lens is not None:
        slot = tl.where(row < tl.load(accept_lens + request), slot, 0)
    tl.store(slots + at, slot)
    element = tl.arange(0, BLOCK)
    inside = element < 2 * pairs
    angle = tl.load(table + position * 2 * pairs + element, mask=inside, other=0.0)
    tl.store(rotation + at * 2 * pairs + element, angle, mask=inside)


def step_rows(
    requests: torch.Tensor,  # [bs], int32
    seq_lens: torch.Tensor,  # [bs], int32
    req_to_token: torch.Tensor,  # [pool, width], int32
    table: torch.Tensor,  # [positions, pairs], complex64: `RotaryEmbedding.table`
    rows: int,  # D
    accept_lens: torch.Tensor
    | None = None,  # [bs], int32: rows from there on have slot 0; None: all have theirs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """positions [bs, D] and slots [bs, D], int64, rotation [bs, D, 1, pairs], complex64: of the positions
    seq_len .. seq_len + D - 1 of each request."""
    bs, pairs = seq_lens.shape[0], table.shape[1]
    positions = torch.empty((bs, rows), dtype=torch.int64, device=seq_lens.device)
    slots = torch.empty_like(positions)
    rotation = torch.empty((bs, rows, 1, pairs), dtype=torch.complex64, device=seq_lens.device)
    assert req_to_token.is_contiguous() and table.is_contiguous()
    _step_rows_kernel[(bs, rows)](
        requests,
        seq_lens,
        accept_lens,
        req_to_token,
        torch.view_as_real(table),
        positions,
        slots,
        torch.view_as_real(rotation),
        pairs,
        req_to_token.shape[1],
        BLOCK=triton.next_power_of_2(2 * pairs),
        num_warps=1,
        **dependent_launch(seq_lens.device),
    )
    return positions, slots, rotation
