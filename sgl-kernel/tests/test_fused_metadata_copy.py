"""fused_metadata_copy through its plan, against plain torch, with poison around everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sgl_kernel
import torch
from arena import DECODE, DRAFT_EXTEND, TARGET_VERIFY, huge_table
from copy_cases import CopyCase, CopyRig, RegionSpec, metadata_copy_case

CORRECTNESS = [
    metadata_copy_case(DECODE, 4, 300, n=3),
    metadata_copy_case(DECODE, 32, 1000, n=7, wider=24),
    metadata_copy_case(TARGET_VERIFY, 5, 257, rows_per_req=4, n=3),
    metadata_copy_case(DRAFT_EXTEND, 6, 190, rows_per_req=4, expanded=13, n=3, spare_cols=77),
    metadata_copy_case(TARGET_VERIFY, 3, 130, rows_per_req=4, seqlens_expanded=False),
    metadata_copy_case(DECODE, 4, 300, flashmla=True),
    metadata_copy_case(DECODE, 4, 300, real_page_table=False),
    metadata_copy_case(DECODE, 4, 300, page_size=1),
    metadata_copy_case(DRAFT_EXTEND, 6, 190, rows_per_req=4, expanded=9, flashmla=True, wider=7, shift=1),
    *[metadata_copy_case(DECODE, 3, 65, n=n) for n in range(1, 21)],
]
CORNER = [
    *[metadata_copy_case(DECODE, bs, 67) for bs in (0, 1, 7)],
    *[metadata_copy_case(DECODE, 3, max_len, wider=5) for max_len in (0, 1, 63, 64, 65, 4095)],
    *[metadata_copy_case(DECODE, 3, max_len, shift=3) for max_len in (1, 64, 4097)],
    metadata_copy_case(DRAFT_EXTEND, 4, 100, rows_per_req=4, expanded=0),
    metadata_copy_case(DRAFT_EXTEND, 4, 100, rows_per_req=4, expanded=-1),
    metadata_copy_case(DECODE, 0, 0, n=2),
]
PERFORMANCE = [
    metadata_copy_case(DECODE, 2, 131072, n=2),
    metadata_copy_case(TARGET_VERIFY, 16, 16384, rows_per_req=4, n=3, wider=64),
    metadata_copy_case(DECODE, 300, 4095, n=2, shift=1),
]


@pytest.mark.parametrize("case", CORRECTNESS + CORNER + PERFORMANCE)
def test_metadata_fields(case: CopyCase, device: str) -> None:
    assert CopyRig(case, device).check() == 1


ELEMENTS = [
    RegionSpec("ids", (100,), ((0, 0, 0), (0, 3, 0)), torch.int64),
    RegionSpec("positions", (33,), ((0, 0, 0), (0, 1, 1)), torch.int64, src_shift=1),
    RegionSpec("mask", (5, 77), ((0, 0, 0), (1, 3, 1)), torch.uint8, cols_per=1),
    RegionSpec("halves", (6, 31), ((0, 0, 0), (1, 3, 1)), torch.int16, rows="expanded"),
    RegionSpec("bytes", (4, 4100), ((0, 12, 0), (1, 28, 0)), torch.uint8, src_extra=12),
]


@pytest.mark.parametrize("spec", ELEMENTS, ids=lambda s: s.name)
def test_element_sizes(spec: RegionSpec, device: str) -> None:
    runs = ((-1, -1), (3, 19), (0, 0)) if len(spec.shape) == 2 else ((-1, -1),)
    CopyRig(CopyCase((spec,), runs), device).check()


def test_one_plan_serves_every_extent(device: str) -> None:
    case = metadata_copy_case(DRAFT_EXTEND, 4, 200, rows_per_req=3, n=3)
    runs = tuple((rows, max_len) for rows in (0, 1, 5, 12, -1) for max_len in (0, 1, 64, 65, 200, -1))
    assert CopyRig(replace(case, runs=runs), device).check() == len(runs)


def test_broadcast_source(device: str) -> None:
    source = torch.arange(70, dtype=torch.int32, device=device).expand(5, 70)  # row stride 0
    destination = torch.zeros(5, 70, dtype=torch.int32, device=device)
    sgl_kernel.FusedMetadataCopyPlan([sgl_kernel.CopyRegion(source, (destination,))]).run()
    assert torch.equal(destination, source)


def test_interleaved_columns_are_no_overlap(device: str) -> None:
    buffer = torch.arange(4 * 40, dtype=torch.int32, device=device).view(4, 40)
    expected = buffer.clone()
    expected[:, 20:] = expected[:, :20]
    sgl_kernel.FusedMetadataCopyPlan([sgl_kernel.CopyRegion(buffer[:, :20], (buffer[:, 20:],))]).run()
    assert torch.equal(buffer, expected)


LAUNCHES = [(16, 9, 1), (20, 9, 2), (1, 32, 1), (1, 33, 2), (159, 1, 1), (160, 1, 2), (0, 3, 0), (30, 12, 3)]


@pytest.mark.parametrize(("destinations", "regions", "launches"), LAUNCHES)
def test_launches(destinations: int, regions: int, launches: int, device: str) -> None:
    spec = RegionSpec("r", (3, 11), ((0, 1, 0),) * destinations)
    rig = CopyRig(CopyCase((spec,) * regions), device)
    rig.check()
    assert rig.plan.launches == launches


def test_seven_backends_with_lengths_of_their_own_are_one_launch(device: str) -> None:
    """Draft lengths `step`: two tables into all of seven backends, four vectors into each. It took three."""
    table, vector = (RegionSpec("r", shape, ((0, 1, 0),) * n) for shape, n in (((3, 11), 7), ((3,), 1)))
    rig = CopyRig(CopyCase((table,) * 2 + (vector,) * 28), device)
    rig.check()
    assert rig.plan.launches == 1


def test_rows_four_mebibytes_apart(device: str) -> None:
    """2048 rows x 1,048,576 columns: the last row starts past 2^32 elements' bytes."""
    rows = 2048
    source = torch.arange(rows * 9, dtype=torch.int32, device=device).view(rows, 9) + 1
    with huge_table(rows, 1 << 20, device) as table:
        region = sgl_kernel.CopyRegion(source, (table[:, :9], table[:, 1000:1010]))
        sgl_kernel.FusedMetadataCopyPlan([region]).run()
        assert torch.equal(table[:, :9], source)
        assert torch.equal(table[:, 1000:1009], source)
        assert not table[:, 9].any() and not table[:, 1009].any()


def test_plan_keeps_tensors_alive(device: str) -> None:
    source = torch.arange(1000, dtype=torch.int32, device=device)
    destination = torch.zeros(1000, dtype=torch.int32, device=device)
    plan = sgl_kernel.FusedMetadataCopyPlan([sgl_kernel.CopyRegion(source.clone(), (destination,))])
    _reuse = [torch.full((1000,), -1, dtype=torch.int32, device=device) for _ in range(50)]
    plan.run()
    assert torch.equal(destination, source)


@pytest.mark.gpu
def test_runs_on_the_current_stream(cuda: str) -> None:
    source = torch.zeros(1 << 20, dtype=torch.int32, device=cuda)
    destination = torch.full_like(source, -1)
    plan = sgl_kernel.FusedMetadataCopyPlan([sgl_kernel.CopyRegion(source, (destination,))])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for value in range(20):
            source.fill_(value)
            plan.run()
    stream.synchronize()
    assert (destination == 19).all()


@pytest.mark.gpu
def test_runs_on_the_device_of_its_tensors(cuda: str) -> None:
    """Whatever device is current; the current one stays current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    for current, other in ((0, 1), (1, 0)):
        with torch.cuda.device(current):
            source = torch.arange(1000, device=f"cuda:{other}")
            destination = torch.zeros_like(source)
            sgl_kernel.FusedMetadataCopyPlan([sgl_kernel.CopyRegion(source, (destination,))]).run()
            assert torch.cuda.current_device() == current
            assert torch.equal(source, destination)
