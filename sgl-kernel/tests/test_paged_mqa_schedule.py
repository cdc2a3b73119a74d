"""DeepGEMM's schedule of paged MQA logits against a list of all work, divided by hand."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable

import pytest
import sgl_kernel
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import POISON, Malformed, check, i32, reject
from sgl_kernel import DEEP_GEMM_SPLITS, PagedMQASchedule, PagedMQASchedulePlan, PagedMQASplit, find_split

SEGMENT = 256
SPLITS = [
    PagedMQASplit(*parts)
    for parts in itertools.product(
        ("all", "two", "two if even", "one"), ("first", "last"), ("atoms", "segments")
    )
]


def reference(lens: list[list[int]], num_sms: int, split: PagedMQASplit) -> list[list[int]]:
    """Lists all work in order, and where each SM starts in the list."""
    atoms = split.atoms(len(lens[0])) if lens else 1
    work = []
    for request, row in enumerate(lens):
        segments = -(-max(row[-1], 0) // SEGMENT)
        if split.order == "atoms":
            work += [
                [request * atoms + atom, segment] for atom in range(atoms) for segment in range(segments)
            ]
        else:  # an SM starts with the whole of a segment: at the request's first row
            work += [[request * atoms, segment] for segment in range(segments) for _ in range(atoms)]
    share, rest = divmod(len(work), num_sms)
    counts = [share + 1] * rest + [share] * (num_sms - rest)
    if split.remainder == "last":
        counts.reverse()
    starts = [0, *itertools.accumulate(counts)]
    return [[*work, [len(lens) * atoms, 0]][start] for start in starts]


def run(lens: torch.Tensor, num_sms: int, split: PagedMQASplit) -> list[list[int]]:
    schedule = i32(num_sms + 1, 2, device=lens.device)
    plan = PagedMQASchedulePlan([PagedMQASchedule(lens, schedule)], split=split)
    assert plan.launches == 1
    plan.run()
    return schedule.tolist()


CORNERS = [
    ([], 1, 132),
    ([0], 1, 132),
    ([0, 0, 0], 2, 132),
    ([1], 1, 132),
    ([256], 3, 132),
    ([257], 4, 132),
    ([0, 300, 0], 1, 7),
    ([-1, -(2**31), 5], 1, 4),
    ([1] * 32, 1, 132),
    ([13107] * 128, 1, 132),
    ([700] * 1025, 2, 78),
    ([7000, 3] * 133, 1, 1),
    ([7000, 3] * 40, 1, 300),
]


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: f"{s.rows_per_atom}-{s.remainder}-{s.order}")
@pytest.mark.parametrize(("lens", "next_n", "num_sms"), CORNERS)
def test_corners(lens: list[int], next_n: int, num_sms: int, split: PagedMQASplit, device: str) -> None:
    rows = [[POISON] * (next_n - 1) + [n] for n in lens]  # only the last length counts
    tensor = torch.tensor(rows, dtype=torch.int32, device=device).view(len(lens), next_n)
    assert run(tensor, num_sms, split) == reference(rows, num_sms, split)
    if next_n == 1:
        assert run(tensor[:, 0], num_sms, split) == reference(rows, num_sms, split)


def test_more_work_than_32_bits_count(device: str) -> None:
    """Requests x segments x atoms beyond 2^32: nothing wraps."""
    batch, next_n, num_sms = 600, 2, 132
    lens = torch.full((batch, next_n), 2**31 - 1, dtype=torch.int32, device=device)
    schedule = run(lens, num_sms, PagedMQASplit("one"))
    segments, atoms = 2**31 // SEGMENT, batch * next_n
    share, rest = divmod(segments * atoms, num_sms)
    assert segments * atoms > 2**32
    starts = [sm * share + min(sm, rest) for sm in range(num_sms + 1)]
    assert schedule == [list(divmod(start, segments)) for start in starts]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**40))
def test_random(seed: int) -> None:
    rng = random.Random(seed)
    batch, next_n, num_sms = (
        rng.choice((rng.randint(0, 9), rng.randint(0, 400))),
        rng.randint(1, 5),
        rng.randint(1, 300),
    )
    longest = rng.choice((3, 260, 6000))
    rows = [[rng.randint(0, longest) for _ in range(next_n)] for _ in range(batch)]
    split = rng.choice(SPLITS)
    lens = torch.tensor(rows, dtype=torch.int32).view(batch, next_n)
    assert run(lens, num_sms, split) == reference(rows, num_sms, split)


@pytest.mark.parametrize("count", [2, 65])
def test_many_schedules_of_one_plan(count: int, device: str) -> None:
    """Each backend has lengths and a schedule of its own; strided lengths, and SM counts that differ."""
    lens = torch.randint(0, 9000, (33, count), dtype=torch.int32).to(device)
    schedules = [PagedMQASchedule(lens[:, k], i32(10 + k, 2, device=device)) for k in range(count)]
    plan = PagedMQASchedulePlan(schedules)
    assert plan.launches == -(-count // 64)
    for _ in range(2):  # a second run with other lengths: they are read at every run
        plan.run()
        for k, schedule in enumerate(schedules):
            rows = [[n] for n in lens[:, k].tolist()]
            assert schedule.schedule.tolist() == reference(rows, 9 + k, PagedMQASplit())
        lens += 300


@pytest.mark.parametrize("name", DEEP_GEMM_SPLITS)
@pytest.mark.parametrize(("batch", "next_n"), [(1, 1), (1, 3), (32, 1), (7, 3), (16, 4)])
def test_find_split(name: str, batch: int, next_n: int, device: str) -> None:
    """Whatever release is installed, the split that is found gives its results on all other lengths, too."""
    split, num_sms = DEEP_GEMM_SPLITS[name], 132

    def deep_gemm(lens: torch.Tensor) -> torch.Tensor:
        rows = reference(lens.tolist(), num_sms, split)
        return torch.tensor(rows, dtype=torch.int32, device=device)

    found = find_split(deep_gemm, batch=batch, next_n=next_n, num_sms=num_sms, device=device)
    assert found is not None
    rng = random.Random(batch)
    for longest in (2, 300, 5000, 40_000):
        rows = [[rng.randint(0, longest)] * next_n for _ in range(batch)]
        assert reference(rows, num_sms, found) == reference(rows, num_sms, split)


def test_find_split_of_something_else() -> None:
    def other(lens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(133, 2, dtype=torch.int32)

    assert find_split(other, batch=4, next_n=1, num_sms=132, device="cpu") is None


@pytest.mark.gpu
@pytest.mark.parametrize("next_n", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 31, 32, 33, 128, 512])
def test_equals_deep_gemm(batch: int, next_n: int, cuda: str) -> None:
    deep_gemm = pytest.importorskip("deep_gemm")
    num_sms = deep_gemm.get_num_sms()

    def installed(lens: torch.Tensor) -> torch.Tensor:
        return deep_gemm.get_paged_mqa_logits_metadata(lens, 64, num_sms)

    try:
        installed(torch.ones(batch, next_n, dtype=torch.int32, device=cuda))
    except RuntimeError as error:
        pytest.skip(f"deep_gemm does not run here: {error}")
    split = find_split(installed, batch=batch, next_n=next_n, num_sms=num_sms, device=cuda)
    assert split is not None
    for longest in (2, 300, 5000, 100_000):
        lens = torch.randint(0, longest, (batch, next_n), dtype=torch.int32, device=cuda)
        assert run(lens, num_sms, split) == installed(lens).view(torch.int32).tolist()


@pytest.mark.gpu
def test_captured(cuda: str) -> None:
    lens, schedule = i32(32, 1, device=cuda), i32(133, 2, device=cuda)
    plan = PagedMQASchedulePlan([PagedMQASchedule(lens, schedule)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the first launch is the captured one
        plan.run()
    for longest in (1, 257, 131072):
        lens.copy_(torch.randint(0, longest, (32, 1)))
        graph.replay()
        assert schedule.tolist() == reference(lens.tolist(), 132, PagedMQASplit())


REJECTED = [
    reject(
        "int64 lengths",
        "schedules[0].context_lens: expected int32, found int64",
        lambda l, s, d: (l.long(), s),
    ),
    reject(
        "rank", "schedules[0].context_lens: expected rank 1 or 2, found 3", lambda l, s, d: (l[None, None], s)
    ),
    reject(
        "no length a request",
        "schedules[0].context_lens: expected at least one length a request, found 0",
        lambda l, s, d: (i32(4, 0, device=d), s),
    ),
    reject(
        "schedule dtype", "schedules[0].schedule: expected int32, found int64", lambda l, s, d: (l, s.long())
    ),
    reject("schedule rank", "schedules[0].schedule: expected rank 2, found 1", lambda l, s, d: (l, s[0])),
    reject(
        "no SM",
        "schedules[0].schedule: expected a shape of at least [2, 2], found [1, 2]",
        lambda l, s, d: (l, s[:1]),
    ),
    reject(
        "three columns",
        "schedules[0].schedule: expected a contiguous tensor of two columns, found 3 columns",
        lambda l, s, d: (l, i32(9, 3, device=d)),
    ),
    reject(
        "every second row",
        "schedules[0].schedule: expected a contiguous tensor of two columns, found 2 columns, row stride 4",
        lambda l, s, d: (l, s[::2]),
    ),
    reject(
        "writes what it reads",
        "schedules[0].schedule: expected memory apart from every length, found an overlap with schedules[0]",
        lambda l, s, d: (s[:, 0], s),
    ),
    reject(
        "meta schedule",
        "schedules[0].schedule: expected a tensor on ",
        lambda l, s, d: (l, i32(9, 2, device="meta")),
    ),
]


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case: Malformed, device: str) -> None:
    lens, schedule = i32(4, device=device), i32(9, 2, device=device)
    call: Callable[[], object] = lambda: PagedMQASchedulePlan(  # noqa: E731
        [PagedMQASchedule(*case.change(lens, schedule, device))]
    ).run()
    check(case, "paged_mqa_schedule", call, [schedule])


def test_schedules_that_overlap_are_refused(device: str) -> None:
    lens, both = i32(4, device=device), i32(20, 2, device=device)
    message = (
        "schedules[1].schedule: expected memory apart from every other destination, found an overlap with"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        PagedMQASchedulePlan([PagedMQASchedule(lens, both[:11]), PagedMQASchedule(lens, both[10:])])


def test_no_schedules() -> None:
    with pytest.raises(RuntimeError, match="paged_mqa_schedule: schedules: expected at least one, found 0"):
        PagedMQASchedulePlan([])
    with pytest.raises(RuntimeError, match=re.escape("segment: expected 1 .. 2147483647, found 0")):
        PagedMQASchedulePlan([PagedMQASchedule(i32(4, device="cpu"), i32(9, 2, device="cpu"))], segment=0)
    assert sgl_kernel.available("cpu")
