"""What all plans have in common: whose memory they keep, which overlaps they refuse, what is no plan."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy
import pytest
import torch
from malformed import POISON, i32
from sgl_kernel import (
    CopyRegion,
    FusedMetadataCopyPlan,
    MetadataDestination,
    NSAMetadataGeneratePlan,
    PagedMQASchedule,
    PagedMQASchedulePlan,
    fused_metadata_copy_cuda,
)
from test_sglang_calls import good_arguments

if TYPE_CHECKING:
    from sgl_kernel._plan import Plan


def copy_plan(tensor: Callable[..., torch.Tensor]) -> Plan:
    return FusedMetadataCopyPlan([CopyRegion(tensor(4, 8), (tensor(4, 9), tensor(5, 8)))])


def generate_plan(tensor: Callable[..., torch.Tensor], **options: object) -> Plan:
    given = {
        "mode": 0,
        "bs": 2,
        "seq_lens": tensor(2),
        "req_pool_indices": tensor(2),
        "req_to_token": tensor(3, 64),
        "destinations": [MetadataDestination(tensor(2), tensor(3), tensor(2, 64), tensor(2), tensor(3))],
        "page_size": 64,
        "topk": 16,
    }
    return NSAMetadataGeneratePlan(**{**given, **options})


def draft_extend_plan(tensor: Callable[..., torch.Tensor]) -> Plan:
    return generate_plan(tensor, mode=2, rows_per_req=1, accept_lens=tensor(2))


def whole_pages_plan(tensor: Callable[..., torch.Tensor]) -> Plan:
    return generate_plan(tensor, whole_pages=True)


def schedule_plan(tensor: Callable[..., torch.Tensor]) -> Plan:
    return PagedMQASchedulePlan([PagedMQASchedule(tensor(4), tensor(9, 2))])


PLANS = [copy_plan, generate_plan, draft_extend_plan, whole_pages_plan, schedule_plan]


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


# ---- ownership


def assign_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(1, dtype=tensor.dtype)


def set_other(tensor: torch.Tensor) -> None:
    tensor.set_(torch.zeros(1, dtype=tensor.dtype))


@pytest.fixture
def new_garbage_alone() -> Iterator[None]:
    """What was there before a test is not looked through, which takes ten times as long as the test."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("new_garbage_alone")
@pytest.mark.parametrize("take_away", [assign_data, set_other])
@pytest.mark.parametrize("make", PLANS)
def test_memory_stays_while_a_plan_uses_it(
    make: Callable[..., Plan], take_away: Callable[[torch.Tensor], None]
) -> None:
    """`tensor.data = ...` and `tensor.set_` freed memory whose address the plan held: a use after free."""
    tensors, arrays = [], []

    def tensor(*shape: int) -> torch.Tensor:
        array = numpy.zeros(shape, dtype=numpy.int32)
        arrays.append(weakref.ref(array))
        tensors.append(torch.from_numpy(array))
        return tensors[-1]

    plan = make(tensor)
    for given in tensors:
        take_away(given)
    gc.collect()
    assert all(array() is not None for array in arrays)
    plan.run()
    del plan, given
    tensors.clear()
    gc.collect()
    assert all(array() is None for array in arrays)


@pytest.mark.parametrize("take_away", [assign_data, set_other])
def test_a_plan_goes_on_with_the_memory_it_was_made_for(take_away: Callable[..., None], device: str) -> None:
    source, written = i32(8, device=device), i32(8, device=device)
    source_before, written_before = source.view(2, 4), written.view(2, 4)  # of the same storages
    plan = FusedMetadataCopyPlan([CopyRegion(source, (written,))])
    source_before.fill_(5)
    if device == "cpu":
        for tensor in (source, written):
            take_away(tensor)
    plan.run()
    assert (written_before == 5).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
@pytest.mark.parametrize("make", PLANS)
def test_plans_cannot_be_copied(make: Callable[..., Plan], duplicate: Callable[[Plan], object]) -> None:
    """A deep copy had copies of the tensors, and the addresses of the originals."""
    with pytest.raises(TypeError, match=r"Plan holds addresses of tensors: it cannot be copied or pickled"):
        duplicate(make(zeros))


# ---- overlaps


def refused(message: str) -> object:
    return pytest.raises(RuntimeError, match=re.escape(message))


def test_copy_destinations_that_overlap(device: str) -> None:
    """Which of two regions would win was not defined."""
    first, second = i32(8, device=device), i32(8, device=device)
    both = i32(15, device=device)
    message = "regions[1].dsts[0]: expected memory apart from every other destination, found an overlap with"
    with refused(f"fused_metadata_copy: {message} regions[0].dsts[0]"):
        FusedMetadataCopyPlan([CopyRegion(first, (both[:8],)), CopyRegion(second, (both[7:],))])
    with refused("every other destination"):  # the same source, but shifted against itself
        FusedMetadataCopyPlan([CopyRegion(first, (both[:8], both[7:]))])
    with refused("every other destination"):
        FusedMetadataCopyPlan([CopyRegion(first, (both[:8],)), CopyRegion(second, (both[:8],))])


def test_copy_destinations_that_are_side_by_side(device: str) -> None:
    """The same one twice; column ranges of one buffer; a vector in the gap that a table's rows leave."""
    wide = i32(4, 24, device=device)
    table, vector = i32(4, 8, device=device).copy_(torch.arange(32).view(4, 8)), i32(8, device=device)
    regions = [
        CopyRegion(table, (wide[:, :8], wide[:, 8:16], wide[:, :8])),
        CopyRegion(vector, (wide[2, 16:],)),
        CopyRegion(vector, (wide[3, 16:], wide[1, 16:])),
    ]
    FusedMetadataCopyPlan(regions).run()
    assert torch.equal(wide[:, :8], table) and torch.equal(wide[:, 8:16], table)
    with refused("every other destination"):
        FusedMetadataCopyPlan([*regions, CopyRegion(vector, (wide[2, 15:23],))])
    with refused("every other destination"):
        FusedMetadataCopyPlan([*regions, CopyRegion(vector, (wide.view(-1)[20:28],))])


def test_sglang_destinations_that_overlap(device: str) -> None:
    both = i32(10, device=device)
    arguments = {"cache_seqlens_dst": both[:2], "cu_seqlens_k_dst": both[1:4]}
    with refused("fused_metadata_copy_cuda: cu_seqlens_k_dst: expected memory apart from every other"):
        # element 0 of a prefix sum is not written: what is written begins at both[2]
        fused_metadata_copy_cuda(**good_arguments(device, **arguments, cache_seqlens_src=both[5:8], bs=2))
        fused_metadata_copy_cuda(
            **good_arguments(device, cache_seqlens_dst=both[:2], cu_seqlens_k_dst=both[:3])
        )


def destination(device: str, **fields: object) -> MetadataDestination:
    good = {
        "cache_seqlens": i32(2, device=device),
        "cu_seqlens_k": i32(3, device=device),
        "page_table_1": i32(2, 64, device=device),
        "nsa_cache_seqlens": i32(2, device=device),
        "nsa_cu_seqlens_k": i32(3, device=device),
        "real_page_table": i32(2, 1, device=device),
    }
    return MetadataDestination(**{**good, **fields})


def test_generated_destinations_that_overlap(device: str) -> None:
    def plan(*destinations: MetadataDestination) -> Plan:
        return generate_plan(lambda *shape: i32(*shape, device=device).zero_(), destinations=destinations)

    vector, table = i32(4, device=device), i32(3, 64, device=device)
    pages = i32(2, 1, device=device)
    one = destination(device, cache_seqlens=vector[:2], page_table_1=table[:2], real_page_table=pages)
    plan(one, one).run()  # the same values to the same place
    # Tables may be shared with any offset, and with another width; vectors with an equal offset.
    plan(one, destination(device, page_table_1=table[:2], real_page_table=pages, seqlens_offset=1)).run()
    plan(one, destination(device, page_table_1=table[:2, :50], seqlens_offset=2)).run()
    plan(one, destination(device, cache_seqlens=vector[2:])).run()
    for fields, message in (
        ({"cache_seqlens": vector[1:3]}, "destinations[1].cache_seqlens"),
        ({"cache_seqlens": vector[:2], "seqlens_offset": 1}, "destinations[1].cache_seqlens"),
        ({"nsa_cache_seqlens": vector[:2]}, "destinations[1].nsa_cache_seqlens"),
        ({"page_table_1": table[1:]}, "destinations[1].page_table_1"),
        ({"page_table_1": table[:2, 1:]}, "destinations[1].page_table_1"),
        ({"real_page_table": table[:2, :1]}, "destinations[1].real_page_table"),
    ):
        with refused(f"nsa_metadata_generate: {message}: expected memory apart from every other destination"):
            plan(one, destination(device, **fields))


# ---- empty tensors


@pytest.mark.parametrize("strides", [(1, 1), (0, 0), (7, 3), (1, 4)])
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_empty_tensors_may_have_any_strides(
    shape: tuple[int, int], strides: tuple[int, int], device: str
) -> None:
    """What a transposition or an expansion of nothing leaves was refused for its strides."""
    empty = i32(8, 8, device=device).as_strided(shape, strides)
    other = torch.empty(shape, dtype=torch.int32, device=device)
    for source, written in ((empty, other), (other, empty), (empty, empty)):
        FusedMetadataCopyPlan([CopyRegion(source, (written,))]).run()
    tables = {"page_indices_src": empty, "max_seqlen_k": shape[1]}
    if shape[0] == 0:
        fused_metadata_copy_cuda(
            **good_arguments(device, **tables, real_page_table_src=empty, real_page_table_dst=empty)
        )
    if shape[0] == 0:
        generate_plan(
            lambda *s: i32(*s, device=device),
            bs=0,
            destinations=[destination(device, page_table_1=empty)],
        ).run()
    PagedMQASchedulePlan(
        [PagedMQASchedule(i32(0, 3, device=device).as_strided((0, 3), strides), i32(9, 2, device=device))]
    ).run()


# ---- what is no plan


def misaligned(plan: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.uint8), plan])[1:]


def in_steps(plan: torch.Tensor) -> torch.Tensor:
    return plan.repeat_interleave(2)[::2]


def with_launches(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(plan: torch.Tensor) -> torch.Tensor:
        changed = plan.clone()
        changed[8:16].view(torch.int64)[0] = number  # PlanHeader::num_launches
        return changed

    return change


def with_counts(plan: torch.Tensor) -> torch.Tensor:
    """Every 32-bit number of the parameter blocks large: among them those that count what follows."""
    changed = plan.clone()
    changed[40:].view(torch.int32)[:] = 1 << 20
    return changed


NO_PLANS = {
    "of another type": lambda plan: plan.view(torch.int8),
    "of words": lambda plan: plan.view(torch.int64),
    "of two dimensions": lambda plan: plan[None],
    "in steps": in_steps,
    "misaligned": misaligned,
    "cut off": lambda plan: plan[:-8],
    "longer": lambda plan: torch.cat([plan, plan[:8]]),
    "only a header": lambda plan: plan[:40],
    "no header": lambda plan: plan[:39],
    "empty": lambda plan: plan[:0],
    "launches: -1": with_launches(-1),
    "launches: 2": with_launches(2),
    "launches: more than 64 bits of bytes": with_launches(1 << 61),
    "counts": with_counts,
}


@pytest.mark.parametrize("change", NO_PLANS.values(), ids=NO_PLANS.keys())
@pytest.mark.parametrize("make", PLANS)
def test_what_is_no_plan(make: Callable[..., Plan], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A tensor of another type or layout was read as if it were one, a count without a look at its array."""
    plan = make(zeros)
    wrong = change(plan._plan)
    integers = {copy_plan: (-1, -1), schedule_plan: ()}.get(make, (-1,))
    with pytest.raises(RuntimeError, match="plan: expected a plan made by this operator for cpu"):
        plan._run(wrong, *integers)
    plan._run(plan._plan.clone(), *integers)  # any copy of the bytes is as good


def test_lengths_that_no_table_holds(device: str) -> None:
    """64-bit lengths and any legal offset: CPU and CUDA agree to the last bit; sums wrapped before."""
    lens = torch.tensor([2**62, -(2**62), 2**63 - 1, -(2**63), 2**31, 2**30 + 1, -(2**24), 5], device=device)
    for mode, rows_per_req in ((0, 1), (1, 4), (2, 4)):
        for offset in (-(2**24), -1, 0, 2**24):
            rows = len(lens) * rows_per_req
            dst = MetadataDestination(
                cache_seqlens=i32(len(lens), device=device),
                cu_seqlens_k=i32(len(lens) + 1, device=device),
                nsa_cache_seqlens=i32(rows, device=device),
                seqlens_expanded=i32(rows, device=device),
                page_table_1=i32(rows, 16, device=device),
                seqlens_offset=offset,
            )
            plan = NSAMetadataGeneratePlan(
                mode=mode,
                bs=len(lens),
                seq_lens=lens,
                req_pool_indices=torch.zeros_like(lens),
                req_to_token=torch.arange(16, dtype=torch.int32, device=device)[None],
                destinations=[dst],
                page_size=64,
                topk=2048,
                rows_per_req=rows_per_req,
                accept_lens=i32(len(lens), device=device).fill_(3) if mode == 2 else None,
            )
            plan.run()
            kv = [max(max(min(n, 2**30), -(2**30)) + offset, 0) for n in lens.tolist()]
            cached = [n + rows_per_req if mode == 1 else n for n in kv]
            assert dst.cache_seqlens.tolist() == cached
            wrapped = [(sum(cached[:i]) + 2**31) % 2**32 - 2**31 for i in range(len(kv) + 1)]
            assert dst.cu_seqlens_k.tolist() == wrapped
            expanded = {
                0: [[n] for n in kv],
                1: [[n + 1 + j for j in range(4)] for n in kv],
                2: [[*(max(n - 2 + j, 0) for j in range(3)), 0] for n in kv],
            }[mode]
            flat = [n for row in expanded for n in row]
            assert dst.seqlens_expanded.tolist() == flat
            assert dst.nsa_cache_seqlens.tolist() == [min(n, 2048) for n in flat]
            for row, n in enumerate(flat):
                live = min(n, 16)
                assert dst.page_table_1[row].tolist() == [*range(live), *[POISON] * (16 - live)]
