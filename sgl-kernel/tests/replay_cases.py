"""Cases of the copy of a replay's inputs as data, and the plain-torch reference that each is checked
against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sgl_kernel
import torch
from arena import Arena, DrawInt, Slot, assert_same, fill_random

SIX = ("input_ids", "out_loc", "cu_seqlens_k", "positions", "seq_lens", "page_table")  # the seed's, in order


@dataclass(frozen=True)
class FieldSpec:
    """One field: a vector of bs + extra elements, or a table of bs rows. `src_*`, `dst_*`: how the tensors
    differ from what is live: elements past it in each row, rows past it, and where in 16 bytes they
    begin."""

    name: str
    extra: int = 0
    table: bool = False
    src_wider: int = 0
    src_gap: int = 0  # elements between the rows of a table
    src_shift: int = 0
    dst_wider: int = 0
    dst_rows: int = 0
    dst_shift: int = 0


@dataclass(frozen=True)
class ReplayCase:
    fields: tuple[FieldSpec, ...]
    most_bs: int
    most_width: int
    runs: tuple[tuple[int, int], ...]  # (batch size, width) of each run of the one plan
    seed: int = 0


def six_fields(**how: int) -> tuple[FieldSpec, ...]:
    fields = [FieldSpec(name, int(name == "cu_seqlens_k"), name == "page_table") for name in SIX]
    return tuple(replace(field, **how) for field in fields)


class ReplayRig:
    """A case laid out on a device, with its plan. Every run has sources of its own, in memory of its own."""

    def __init__(self, case: ReplayCase, device: str) -> None:
        self.case, self.arena = case, Arena()
        self.dsts = [self._destination(spec) for spec in case.fields]
        self.srcs = [[self._source(spec, r, *run) for spec in case.fields] for r, run in enumerate(case.runs)]
        self.fresh = self.arena.buffer()
        generator = torch.Generator().manual_seed(case.seed)
        for slot in (slot for run in self.srcs for slot in run):
            fill_random(slot.view(self.fresh), generator)
        self.buffer = self.fresh.to(device, copy=True)
        self.plan = sgl_kernel.ReplayCopyPlan(
            [
                sgl_kernel.ReplayField(spec.name, slot.view(self.buffer), spec.extra)
                for spec, slot in zip(case.fields, self.dsts, strict=True)
            ]
        )
        self.bound = sgl_kernel.bind_replay_copy(self.plan)

    def _destination(self, spec: FieldSpec) -> Slot:
        case, name = self.case, f"dst_{spec.name}"
        if spec.table:
            shape = (case.most_bs + spec.dst_rows, case.most_width)
            return self.arena.add(name, shape, torch.int32, spec.dst_wider, spec.dst_shift)
        shape = (case.most_bs + spec.extra + spec.dst_wider,)
        return self.arena.add(name, shape, torch.int32, 0, spec.dst_shift)

    def _source(self, spec: FieldSpec, run: int, bs: int, width: int) -> Slot:
        name = f"run {run}: src_{spec.name}"
        if spec.table:
            return self.arena.add(
                name, (bs, width + spec.src_wider), torch.int32, spec.src_gap, spec.src_shift
            )
        return self.arena.add(name, (bs + spec.extra + spec.src_wider,), torch.int32, 0, spec.src_shift)

    def expected(self, run: int) -> torch.Tensor:
        bs, width = self.case.runs[run]
        expected = self.fresh.clone()
        for spec, src, dst in zip(self.case.fields, self.srcs[run], self.dsts, strict=True):
            if bs == 0:
                continue  # nothing to do
            live = (slice(bs), slice(width)) if spec.table else (slice(bs + spec.extra),)
            dst.view(expected)[live] = src.view(expected)[live]
        return expected

    def sources(self, run: int) -> list[torch.Tensor]:
        return [slot.view(self.buffer) for slot in self.srcs[run]]

    def calls(self, run: int) -> list[tuple[str, object]]:
        """The plan's run, what a replay calls, and with the six fields the call by name."""
        bs, width = self.case.runs[run]
        sources = self.sources(run)
        calls = [
            ("run", lambda: self.plan.run(sources, bs, width)),
            ("bound", lambda: self.bound(bs, width, *sources)),
        ]
        if tuple(spec.name for spec in self.case.fields) == SIX:
            names = [f"src_{name}" for name in SIX] + [f"dst_{name}" for name in SIX]
            tensors = [*sources, *(slot.view(self.buffer) for slot in self.dsts)]
            named = dict(zip(names, tensors, strict=True))
            calls.append(
                (
                    "fused_copy_replay_data",
                    lambda: sgl_kernel.fused_copy_replay_data(**named, batch_size=bs, max_seqlen_k=width),
                )
            )
        return calls

    def check(self) -> int:
        """Makes every call of every run; returns how many."""
        count = 0
        for run in range(len(self.case.runs)):
            expected = self.expected(run)
            for name, call in self.calls(run):
                self.buffer.copy_(self.fresh)
                call()
                assert_same(self.arena, self.buffer, expected, (name, self.case, self.case.runs[run]))
                count += 1
        return count


def random_replay_case(draw: DrawInt, runs: int = 1) -> ReplayCase:
    """The six fields or any others, of any size, alignment and row stride."""
    most_bs = draw(1, 20) if draw(0, 5) else draw(21, 300)
    most_width = draw(1, 90) if draw(0, 5) else draw(91, 3000)
    if draw(0, 1):
        fields = list(six_fields())
    else:
        fields = []
        for f in range(draw(1, 12)):
            table = draw(0, 2) == 0
            fields.append(FieldSpec(f"field_{f}", 0 if table else draw(0, 3), table))
    aligned = draw(0, 1) == 1
    for f, spec in enumerate(fields):
        gap = (4 - most_width % 4) % 4 if aligned else draw(0, 5)
        shift = (lambda: 0) if aligned else (lambda: draw(0, 3))
        fields[f] = replace(
            spec,
            src_wider=draw(0, 2),
            src_gap=draw(0, 4),
            src_shift=shift(),
            dst_wider=gap,
            dst_rows=draw(0, 2),
            dst_shift=shift(),
        )
    extents = tuple((draw(0, most_bs), draw(0, most_width)) for _ in range(runs))
    return ReplayCase(tuple(fields), most_bs, most_width, extents, draw(0, 1000))
