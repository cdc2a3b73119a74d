"""Malformed plans and runs of fused_metadata_copy."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from malformed import POISON, Malformed, check, i32, reject
from sgl_kernel import (
    CopyRegion,
    FusedMetadataCopyPlan,
)

# `change` takes (a good 2-D region, device) and returns the regions of the call.
COPY = [
    reject("no regions", "regions: expected at least one region, found 0", lambda r, d: []),
    reject(
        "rows",
        "regions[0].rows: expected 'all' or 'expanded', found 'some'",
        lambda r, d: [replace(r, rows="some")],
    ),
    reject(
        "float16 destination",
        "regions[0].dsts[0]: expected int32, found float16",
        lambda r, d: [replace(r, dsts=(r.dsts[0].to(torch.float16),))],
    ),
    reject(
        "second region, third destination",
        "regions[1].dsts[2]: expected int32, found int64",
        lambda r, d: [r, replace(r, dsts=(*r.dsts, *r.dsts, r.dsts[0].long()))],
    ),
    reject(
        "complex source",
        "regions[0].src: expected a dtype of 1, 2, 4 or 8 bytes",
        lambda r, d: [replace(r, src=torch.zeros(4, 8, dtype=torch.complex128, device=d))],
    ),
    reject(
        "3-D source",
        "regions[0].src: expected rank 1 or 2, found 3",
        lambda r, d: [replace(r, src=torch.zeros(2, 2, 2, dtype=torch.int32, device=d))],
    ),
    reject(
        "0-D source",
        "regions[0].src: expected rank 1 or 2, found 0",
        lambda r, d: [replace(r, src=torch.zeros((), dtype=torch.int32, device=d))],
    ),
    reject(
        "rank of destination",
        "regions[0].dsts[0]: expected rank 2, found 1",
        lambda r, d: [replace(r, dsts=(i32(100, device=d),))],
    ),
    reject(
        "too few columns",
        "regions[0].dsts[0]: expected a shape of at least [4, 8], found [4, 7]",
        lambda r, d: [replace(r, dsts=(i32(4, 7, device=d),))],
    ),
    reject(
        "too few rows",
        "regions[0].dsts[0]: expected a shape of at least [4, 8], found [3, 9]",
        lambda r, d: [replace(r, dsts=(i32(3, 9, device=d),))],
    ),
    reject(
        "too few elements",
        "regions[0].dsts[0]: expected a shape of at least [8], found [7]",
        lambda r, d: [CopyRegion(r.src[0], (i32(7, device=d),))],
    ),
    reject(
        "transposed source",
        "regions[0].src: expected an inner stride of 1, found 8",
        lambda r, d: [replace(r, src=r.src.t())],
    ),
    reject(
        "every second column",
        "regions[0].dsts[0]: expected an inner stride of 1, found 2",
        lambda r, d: [replace(r, dsts=(i32(4, 16, device=d)[:, ::2],))],
    ),
    reject(
        "rows of the destination overlap",
        "regions[0].dsts[0]: expected rows that do not overlap (row stride of at least 8), found 0",
        lambda r, d: [replace(r, dsts=(i32(1, 8, device=d).expand(4, 8),))],
    ),
    reject(
        "source is destination",
        "regions[0].dsts[0]: expected memory apart from every source, found an overlap with regions[0].src",
        lambda r, d: [replace(r, dsts=(r.src,))],
    ),
    reject(
        "one row overlaps",
        "regions[0].dsts[0]: expected memory apart from every source, found an overlap with regions[0].src",
        lambda r, d: (lambda wide: [CopyRegion(wide[:4], (wide[3:],))])(i32(7, 8, device=d)),
    ),
    reject(
        "source of another region",
        "regions[0].dsts[1]: expected memory apart from every source, found an overlap with regions[1].src",
        lambda r, d: (lambda s: [replace(r, dsts=(*r.dsts, s)), CopyRegion(s, ())])(i32(4, 8, device=d)),
    ),
    reject(
        "rows_extra without expanded",
        'regions[0].rows_extra: expected 0, or with rows="expanded" at most the source\'s 4 rows, found 1',
        lambda r, d: [replace(r, rows_extra=1)],
    ),
    reject(
        "rows_extra negative",
        "regions[0].rows_extra: expected 0, or with",
        lambda r, d: [replace(r, rows="expanded", rows_extra=-1)],
    ),
    reject(
        "cols_per negative",
        "regions[0].cols_per: expected 0, or at least 1 with a 2-D source, found -64",
        lambda r, d: [replace(r, cols_per=-64)],
    ),
    reject(
        "cols_per of a vector",
        "regions[0].cols_per: expected 0, or at least 1 with a 2-D source, found 64",
        lambda r, d: [CopyRegion(r.src[0], (i32(9, device=d),), cols_per=64)],
    ),
    reject(
        "meta destination",
        "regions[0].dsts[0]: expected a tensor on ",
        lambda r, d: [replace(r, dsts=(i32(4, 8, device="meta"),))],
    ),
]


@pytest.mark.parametrize("case", COPY)
def test_copy_plan(case: Malformed, device: str) -> None:
    good = CopyRegion(
        torch.arange(32, dtype=torch.int32, device=device).view(4, 8), (i32(4, 8, device=device),)
    )
    FusedMetadataCopyPlan([good])  # the unchanged call is legal
    call = lambda: FusedMetadataCopyPlan(case.change(good, device)).run()  # noqa: E731
    check(case, "fused_metadata_copy", call, [good.dsts[0]])


RUNS = [
    ((5, -1), "expanded_rows: expected -1 (the full extent) or at most 4, found 5"),
    ((-2, -1), "expanded_rows: expected -1 (the full extent) or at most 4, found -2"),
    ((4, 17), "max_len: expected -1 (the full extent) or at most 16, found 17"),
    ((4, -9), "max_len: expected -1 (the full extent) or at most 16, found -9"),
]


@pytest.mark.parametrize(("integers", "message"), RUNS)
def test_copy_run(integers: tuple[int, int], message: str, device: str) -> None:
    table = CopyRegion(i32(4, 8, device=device) + 1, (i32(4, 8, device=device),), rows="expanded", cols_per=2)
    prefix = CopyRegion(i32(5, device=device) + 1, (i32(5, device=device),), rows="expanded", rows_extra=1)
    plan = FusedMetadataCopyPlan([table, prefix])
    with pytest.raises(RuntimeError, match=re.escape(message)):
        plan.run(*integers)
    assert (table.dsts[0] == POISON).all() and (prefix.dsts[0] == POISON).all()


def test_meta_tensors() -> None:
    region = CopyRegion(i32(4, device="meta"), (i32(4, device="meta"),))
    with pytest.raises(RuntimeError, match="device type: expected one of cpu, cuda, found meta"):
        FusedMetadataCopyPlan([region])


@pytest.mark.gpu
def test_mixed_devices(cuda: str) -> None:
    for src, dst, other in ((cuda, "cpu", "cpu"), ("cpu", cuda, "cuda:0")):
        with pytest.raises(
            RuntimeError, match=rf"regions\[0\].dsts\[0\]: expected a tensor on .*, found {other}"
        ):
            FusedMetadataCopyPlan([CopyRegion(i32(4, device=src), (i32(4, device=dst),))])


def test_a_plan_of_another_operator_is_refused() -> None:
    plan = FusedMetadataCopyPlan([CopyRegion(i32(4, device="cpu"), (i32(4, device="cpu"),))])
    operators = torch.ops.sgl_kernel_nsa_cpu
    for wrong in (torch.zeros(8, dtype=torch.uint8), torch.zeros(100_000, dtype=torch.uint8), plan._plan):
        with pytest.raises(
            RuntimeError, match="nsa_metadata_generate: plan: expected a plan made by this operator"
        ):
            operators.nsa_metadata_generate_run(wrong, -1)
    with pytest.raises(
        RuntimeError, match="fused_metadata_copy: plan: expected a plan made by this operator for cpu"
    ):
        operators.fused_metadata_copy_run(torch.zeros(0, dtype=torch.uint8), -1, -1)
