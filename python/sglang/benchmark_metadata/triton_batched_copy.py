"""The batched copy in Triton: one launch over a table of regions. A reference, and a line in the benchmark.

The earlier Triton version lost to plain `copy_` because it launched one kernel a tensor and rebuilt its
pointer table for each call; here the table is built once and all copies share one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from sglang.srt.layers.attention.nsa.replicate import Region

_BLOCK = 1024
_MAX_BLOCKS = 64  # programs for each copy; they stride over what is left


@triton.jit
def _copy_kernel(table, max_len, BLOCK: tl.constexpr):  # table: [copies, 8], int64
    row = table + tl.program_id(0) * 8
    src = tl.load(row).to(tl.pointer_type(tl.int32))
    dst = tl.load(row + 1).to(tl.pointer_type(tl.int32))
    rows, cols = tl.load(row + 2), tl.load(row + 3)
    src_stride, dst_stride = tl.load(row + 4), tl.load(row + 5)
    cols_per = tl.load(row + 6)
    if (cols_per > 0) & (max_len >= 0):
        cols = tl.minimum(cols, (max_len + cols_per - 1) // cols_per)
    total = rows * cols
    start = tl.program_id(1).to(tl.int64) * BLOCK
    while start < total:
        offset = start + tl.arange(0, BLOCK)
        r, c = offset // cols, offset % cols
        value = tl.load(src + r * src_stride + c, mask=offset < total)
        tl.store(dst + r * dst_stride + c, value, mask=offset < total)
        start += tl.num_programs(1).to(tl.int64) * BLOCK


class BatchedCopy:
    """Planned copies of int32 regions on one CUDA device."""

    def __init__(self, regions: Sequence[Region]) -> None:
        device = regions[0].src.device
        if device.type != "cuda":
            raise ValueError(f"the copy method 'triton' needs CUDA, the metadata is on {device}")
        self.regions = tuple(regions)  # keeps the tensors alive
        lines = [self._line(region, dst) for region in regions for dst in region.dsts]
        largest = max((line[2] * line[3] for line in lines), default=0)
        self.table = torch.tensor(lines, dtype=torch.int64, device=device)  # [copies, 8]
        self.grid = (len(lines), max(1, min(_MAX_BLOCKS, -(-largest // _BLOCK))))

    @staticmethod
    def _line(region: Region, dst: torch.Tensor) -> list[int]:
        src = region.src
        rows, cols = (1, src.shape[0]) if src.dim() == 1 else src.shape
        strides = (0, 0) if src.dim() == 1 else (src.stride(0), dst.stride(0))
        return [src.data_ptr(), dst.data_ptr(), rows, cols, *strides, region.cols_per, 0]

    def run(self, max_len: int) -> None:
        """Copies the live extent; `max_len` bounds the row lengths (-1: the full tables)."""
        _copy_kernel[self.grid](self.table, max_len, BLOCK=_BLOCK)
