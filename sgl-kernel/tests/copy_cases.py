"""Copy cases as data, and the plain-torch reference that each is checked against."""

from __future__ import annotations

from dataclasses import dataclass

import sgl_kernel
import torch
from arena import DECODE, Arena, DrawInt, Slot, assert_same, fill_random

DTYPES = (torch.int32, torch.int64, torch.uint8, torch.int16)


@dataclass(frozen=True)
class RegionSpec:
    """One region of a copy case; `dsts` gives (extra rows, extra columns, shift) of each destination."""

    name: str
    shape: tuple[int, ...]
    dsts: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype = torch.int32
    rows: str = "all"
    rows_extra: int = 0
    cols_per: int = 0
    src_extra: int = 0
    src_shift: int = 0

    def live(self, expanded_rows: int, max_len: int) -> tuple[slice, ...]:
        rows = (
            slice(None) if self.rows == "all" or expanded_rows < 0 else slice(expanded_rows + self.rows_extra)
        )
        if len(self.shape) == 1:
            return (rows,) if self.rows == "expanded" and expanded_rows >= 0 else (slice(self.shape[0]),)
        full = slice(self.shape[0]) if rows.stop is None else rows
        cols = self.shape[1] if self.cols_per == 0 or max_len < 0 else -(-max_len // self.cols_per)
        return (full, slice(cols))


@dataclass(frozen=True)
class CopyCase:
    regions: tuple[RegionSpec, ...]
    runs: tuple[tuple[int, int], ...] = ((-1, -1),)  # (expanded_rows, max_len) of each run of the one plan
    seed: int = 0


class CopyRig:
    """A copy case laid out on a device, with its plan."""

    def __init__(self, case: CopyCase, device: str) -> None:
        self.case, self.arena = case, Arena()
        self.slots: list[tuple[Slot, list[Slot]]] = []
        for r, spec in enumerate(case.regions):
            name = f"{r}:{spec.name}"
            src = self.arena.add(f"{name}.src", spec.shape, spec.dtype, spec.src_extra, spec.src_shift)
            dsts = []
            for d, (rows, cols, shift) in enumerate(spec.dsts):
                more = (cols,) if len(spec.shape) == 1 else (rows, cols)
                grown = tuple(a + b for a, b in zip(spec.shape, more, strict=True))
                dsts.append(self.arena.add(f"{name}.dst{d}", grown, spec.dtype, 0, shift))
            self.slots.append((src, dsts))
        self.fresh = self.arena.buffer()
        generator = torch.Generator().manual_seed(case.seed)
        for src, _ in self.slots:
            fill_random(src.view(self.fresh), generator)
        self.buffer = self.fresh.to(device, copy=True)
        self.plan = sgl_kernel.FusedMetadataCopyPlan(
            [
                sgl_kernel.CopyRegion(
                    src.view(self.buffer),
                    tuple(d.view(self.buffer) for d in dsts),
                    spec.rows,
                    spec.rows_extra,
                    spec.cols_per,
                )
                for spec, (src, dsts) in zip(case.regions, self.slots, strict=True)
            ]
        )

    def expected(self, expanded_rows: int, max_len: int) -> torch.Tensor:
        expected = self.fresh.clone()
        for spec, (src, dsts) in zip(self.case.regions, self.slots, strict=True):
            live = spec.live(expanded_rows, max_len)
            for dst in dsts:
                dst.view(expected)[live] = src.view(expected)[live]
        return expected

    def check(self) -> int:
        """Runs all runs of the case; returns how many."""
        for expanded_rows, max_len in self.case.runs:
            self.buffer.copy_(self.fresh)
            self.plan.run(expanded_rows, max_len)
            expected = self.expected(expanded_rows, max_len)
            assert_same(self.arena, self.buffer, expected, (self.case, expanded_rows, max_len))
        return len(self.case.runs)


def metadata_copy_case(
    mode: int,
    bs: int,
    max_len: int,
    *,
    n: int = 3,
    page_size: int = 64,
    rows_per_req: int = 1,
    expanded: int | None = None,
    wider: int = 0,
    shift: int = 0,
    real_page_table: bool = True,
    seqlens_expanded: bool = True,
    flashmla: bool = False,
    spare_cols: int = 0,
) -> CopyCase:
    """What a backend set needs copied, field by field. `spare_cols`: in the plan, but not in the run."""
    rows = bs * rows_per_req
    expanded = rows if expanded is None else expanded
    pages = -(-(max_len + spare_cols) // page_size)
    dsts = tuple((0, wider, shift) for _ in range(n))
    grown = tuple((2, wider, shift) for _ in range(n))
    regions = [
        RegionSpec("cache_seqlens", (bs,), dsts),
        RegionSpec("cu_seqlens_k", (bs + 1,), dsts),
        RegionSpec(
            "page_indices", (rows, max_len + spare_cols), grown, rows="expanded", cols_per=1, src_shift=shift
        ),
        RegionSpec("nsa_cache_seqlens", (rows,), dsts, rows="expanded"),
        RegionSpec("nsa_cu_seqlens_k", (rows + 1,), dsts, rows="expanded", rows_extra=1),
    ]
    if mode != DECODE and seqlens_expanded:
        regions.append(RegionSpec("seqlens_expanded", (rows,), dsts, rows="expanded"))
    if real_page_table and page_size > 1:
        regions.append(
            RegionSpec("real_page_table", (rows, pages), grown, rows="expanded", cols_per=page_size)
        )
    if flashmla:
        regions.append(RegionSpec("flashmla_metadata", (132, 8), dsts))
        regions.append(RegionSpec("num_splits", (rows + 1,), dsts, rows="expanded", rows_extra=1))
    return CopyCase(tuple(regions), ((expanded, max_len),))


def random_copy_case(draw: DrawInt, runs: int = 1) -> CopyCase:
    """Any regions of any dtype, alignment and extent."""
    most_dsts = draw(0, 7) if draw(0, 9) else draw(8, 20)
    regions = []
    for r in range(draw(1, 5) if draw(0, 9) else draw(6, 16)):
        dtype = DTYPES[(0, 0, 0, 1, 2, 3)[draw(0, 5)]]
        cols = draw(0, 70) if draw(0, 7) else draw(71, 3000)
        one_d = draw(0, 2) == 0
        shape = (cols,) if one_d else (draw(0, 9), cols)
        aligned = draw(0, 1) == 0  # every start and stride on 16 bytes, so that the wide path is taken often
        dsts = []
        for _ in range(most_dsts):
            extra = (16 - cols % 16) % 16 if aligned else draw(0, 5)
            dsts.append((draw(0, 2), extra, 0 if aligned else draw(0, 3)))
        expanded = draw(0, 1) == 1
        most_rows = cols if one_d else shape[0]
        regions.append(
            RegionSpec(
                f"region{r}",
                shape,
                tuple(dsts),
                dtype,
                "expanded" if expanded else "all",
                draw(0, min(1, most_rows)) if expanded else 0,
                0 if one_d else (0, 1, 7, 64)[draw(0, 3)],
                (16 - cols % 16) % 16 if aligned else draw(0, 3),
                0 if aligned else draw(0, 3),
            )
        )
    most_rows = [s.shape[0] - s.rows_extra for s in regions if s.rows == "expanded"]
    most_len = [s.shape[1] * s.cols_per for s in regions if s.cols_per > 0]
    extents = tuple(
        (draw(-1, min(most_rows, default=9)), draw(-1, min(most_len, default=9))) for _ in range(runs)
    )
    return CopyCase(tuple(regions), extents, draw(0, 1000))
