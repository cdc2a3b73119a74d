"""Malformed calls: each is rejected with its message, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from sgl_kernel import (
    CopyRegion,
    FusedMetadataCopyPlan,
    MetadataDestination,
    NSAMetadataGeneratePlan,
    fused_metadata_copy_cuda,
    fused_metadata_copy_multi_cuda,
)

POISON = -77


def i32(*shape: int, device: str) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Malformed:
    name: str
    message: str  # as it stands in the error, after the operator's name
    change: Callable[..., object]


def reject(name: str, message: str, change: Callable[..., object]) -> object:
    return pytest.param(Malformed(name, message, change), id=name)


def check(case: Malformed, operator: str, call: Callable[[], object], written: list[torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"{operator}: {case.message}")):
        call()
    assert all((tensor == POISON).all() for tensor in written if tensor.device.type != "meta")


# ---- fused_metadata_copy: `change` takes (a good 2-D region, device) and returns the regions of the call --

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
        lambda r, d: (lambda s: [replace(r, dsts=(*r.dsts, s)), replace(r, src=s)])(i32(4, 8, device=d)),
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


# ---- nsa_metadata_generate: `change` takes (the good arguments, device) and returns those to replace ------


def good_destination(device: str) -> MetadataDestination:
    sizes = ((3,), (4,), (6, 50), (6,), (7,), (6,), (6, 1))
    return MetadataDestination(*(i32(*shape, device=device) for shape in sizes))


def good_arguments(device: str) -> dict[str, object]:
    return {
        "mode": 2,
        "bs": 3,
        "seq_lens": torch.tensor([3, 4, 5], dtype=torch.int32, device=device),
        "req_pool_indices": torch.tensor([0, 1, 1], device=device),
        "req_to_token": torch.arange(100, dtype=torch.int32, device=device).view(2, 50),
        "destinations": [good_destination(device)],
        "page_size": 64,
        "topk": 2048,
        "rows_per_req": 2,
        "accept_lens": torch.tensor([1, 2, 0], dtype=torch.int32, device=device),
    }


def with_field(field: str, value: Callable[[str], object]) -> Callable[..., dict[str, object]]:
    return lambda a, d: {
        "destinations": [a["destinations"][0], replace(good_destination(d), **{field: value(d)})]
    }


GENERATE = [
    reject("mode", "mode: expected 0 .. 2, found 3", lambda a, d: {"mode": 3}),
    reject("bs", "bs: expected 0 .. 16777216, found -1", lambda a, d: {"bs": -1}),
    reject("page_size", "page_size: expected 1 .. 2147483647, found 0", lambda a, d: {"page_size": 0}),
    reject("topk", "topk: expected 1 .. 2147483647, found 0", lambda a, d: {"topk": 0}),
    reject("rows_per_req", "rows_per_req: expected 1 .. ", lambda a, d: {"rows_per_req": 0}),
    reject(
        "rows_per_req in DECODE",
        "rows_per_req: expected 1 .. 1, found 2",
        lambda a, d: {"mode": 0, "accept_lens": None},
    ),
    reject(
        "packed in TARGET_VERIFY",
        "packed: expected False outside DRAFT_EXTEND (mode 2), found True",
        lambda a, d: {"mode": 1, "packed": True, "accept_lens": None},
    ),
    reject(
        "no accept_lens",
        "accept_lens: expected a tensor in DRAFT_EXTEND, found None",
        lambda a, d: {"accept_lens": None},
    ),
    reject(
        "accept_lens in TARGET_VERIFY",
        "accept_lens: expected None outside DRAFT_EXTEND, found a tensor",
        lambda a, d: {"mode": 1},
    ),
    reject(
        "seq_lens dtype",
        "seq_lens: expected int32 or int64, found float32",
        lambda a, d: {"seq_lens": a["seq_lens"].float()},
    ),
    reject(
        "seq_lens rank",
        "seq_lens: expected rank 1, found 2",
        lambda a, d: {"seq_lens": a["seq_lens"].view(1, 3)},
    ),
    reject(
        "seq_lens size",
        "seq_lens: expected a shape of at least [3], found [2]",
        lambda a, d: {"seq_lens": a["seq_lens"][:2]},
    ),
    reject(
        "seq_lens stride",
        "seq_lens: expected an inner stride of 1, found 2",
        lambda a, d: {"seq_lens": i32(6, device=d)[::2]},
    ),
    reject(
        "req_pool_indices dtype",
        "req_pool_indices: expected int32 or int64, found uint8",
        lambda a, d: {"req_pool_indices": a["req_pool_indices"].to(torch.uint8)},
    ),
    reject(
        "req_to_token dtype",
        "req_to_token: expected int32, found int64",
        lambda a, d: {"req_to_token": a["req_to_token"].long()},
    ),
    reject(
        "req_to_token rank",
        "req_to_token: expected rank 2, found 1",
        lambda a, d: {"req_to_token": a["req_to_token"].view(-1)},
    ),
    reject(
        "req_to_token empty",
        "req_to_token: expected a shape of at least [1, 0], found [0, 50]",
        lambda a, d: {"req_to_token": a["req_to_token"][:0]},
    ),
    reject(
        "accept_lens dtype",
        "accept_lens: expected int32, found int64",
        lambda a, d: {"accept_lens": a["accept_lens"].long()},
    ),
    reject(
        "cache_seqlens missing",
        "destinations[1].cache_seqlens: expected a tensor, found None",
        with_field("cache_seqlens", lambda d: None),
    ),
    reject(
        "cache_seqlens dtype",
        "destinations[1].cache_seqlens: expected int32, found int64",
        with_field("cache_seqlens", lambda d: i32(3, device=d).long()),
    ),
    reject(
        "cu_seqlens_k size",
        "destinations[1].cu_seqlens_k: expected a shape of at least [4], found [3]",
        with_field("cu_seqlens_k", lambda d: i32(3, device=d)),
    ),
    reject(
        "page_table_1 rows",
        "destinations[1].page_table_1: expected a shape of at least [6, 0], found [5, 50]",
        with_field("page_table_1", lambda d: i32(5, 50, device=d)),
    ),
    reject(
        "page_table_1 width",
        "destinations[1].page_table_1: expected at most 50 columns (req_to_token has 50, page size 1)",
        with_field("page_table_1", lambda d: i32(6, 51, device=d)),
    ),
    reject(
        "real_page_table width",
        "destinations[1].real_page_table: expected at most 1 columns (req_to_token has 50, page size 64)",
        with_field("real_page_table", lambda d: i32(6, 2, device=d)),
    ),
    reject(
        "page_table_1 stride",
        "destinations[1].page_table_1: expected an inner stride of 1, found 2",
        with_field("page_table_1", lambda d: i32(6, 50, device=d)[:, ::2]),
    ),
    reject(
        "nsa_cu_seqlens_k size",
        "destinations[1].nsa_cu_seqlens_k: expected a shape of at least [7], found [6]",
        with_field("nsa_cu_seqlens_k", lambda d: i32(6, device=d)),
    ),
    reject(
        "seqlens_expanded rank",
        "destinations[1].seqlens_expanded: expected rank 1, found 2",
        with_field("seqlens_expanded", lambda d: i32(6, 1, device=d)),
    ),
    reject(
        "nsa_cache_seqlens on meta",
        "destinations[1].nsa_cache_seqlens: expected a tensor on ",
        with_field("nsa_cache_seqlens", lambda d: i32(6, device="meta")),
    ),
    reject(
        "seq_lens is cache_seqlens",
        "destinations[0].cache_seqlens: expected memory apart from every input, found an overlap with seq_",
        lambda a, d: {"destinations": [replace(good_destination(d), cache_seqlens=a["seq_lens"])]},
    ),
    reject(
        "page_table_1 in req_to_token",
        "destinations[0].page_table_1: expected memory apart from every input, found an overlap with req_",
        lambda a, d: (
            lambda wide: {
                "req_to_token": wide[:3],
                "destinations": [replace(good_destination(d), page_table_1=wide[2:])],
            }
        )(i32(8, 50, device=d)),
    ),
]


@pytest.mark.parametrize("case", GENERATE)
def test_generate_plan(case: Malformed, device: str) -> None:
    good = good_arguments(device)
    NSAMetadataGeneratePlan(**good)  # the unchanged call is legal
    written = [t for t in good["destinations"][0].tensors() if t is not None]
    call = lambda: NSAMetadataGeneratePlan(**{**good, **case.change(good, device)}).run()  # noqa: E731
    check(case, "nsa_metadata_generate", call, written)


# ---- SGLang's calls: `change` takes (the good arguments, device) and returns those to replace -------------


def sglang_arguments(device: str, sides: tuple[str, ...]) -> dict[str, object]:
    shapes = {
        "cache_seqlens": (2,),
        "cu_seqlens_k": (3,),
        "page_indices": (8, 20),
        "nsa_cache_seqlens": (8,),
        "nsa_cu_seqlens_k": (9,),
        "real_page_table": (8, 1),
        "flashmla_num_splits": (9,),
        "flashmla_metadata": (4, 8),
    }
    if sides == ("src", "dst"):
        shapes["seqlens_expanded"] = (8,)
    return {f"{name}_{side}": i32(*shape, device=device) for side in sides for name, shape in shapes.items()}


SINGLE = [
    reject(
        "forward_mode",
        "forward_mode: expected 0 (DECODE), 1 (TARGET_VERIFY) or 2 (DRAFT_EXTEND), found 5",
        lambda a, d: {"forward_mode": 5},
    ),
    reject("bs", "bs: expected 0 .. 2147483647, found -1", lambda a, d: {"bs": -1}),
    reject(
        "max_seqlen_k", "max_seqlen_k: expected 0 .. 2147483647, found -7", lambda a, d: {"max_seqlen_k": -7}
    ),
    reject(
        "expanded rows in DECODE",
        "seqlens_expanded_size: expected bs (2) in DECODE, found 8",
        lambda a, d: {"forward_mode": 0},
    ),
    reject(
        "bs past the source",
        "cache_seqlens_src: expected a shape of at least [3], found [2]",
        lambda a, d: {"bs": 3},
    ),
    reject(
        "rows past the source",
        "page_indices_src: expected a shape of at least [9, 20], found [8, 20]",
        lambda a, d: {"seqlens_expanded_size": 9},
    ),
    reject(
        "columns past the source",
        "page_indices_src: expected a shape of at least [8, 21], found [8, 20]",
        lambda a, d: {"max_seqlen_k": 21},
    ),
    reject(
        "mode without its field",
        "seqlens_expanded_src: expected a tensor in TARGET_VERIFY and DRAFT_EXTEND, found None",
        lambda a, d: {"seqlens_expanded_src": None},
    ),
    reject(
        "source without destination",
        "real_page_table_dst: expected a tensor, since its source is given, found None",
        lambda a, d: {"real_page_table_dst": None},
    ),
    reject(
        "dtype",
        "nsa_cu_seqlens_k_dst: expected int32, found int64",
        lambda a, d: {"nsa_cu_seqlens_k_dst": a["nsa_cu_seqlens_k_dst"].long()},
    ),
    reject(
        "partial overlap",
        "cache_seqlens_dst: expected memory apart from every source, found an overlap with cache_seqlens_src",
        lambda a, d: (lambda v: {"cache_seqlens_src": v[:2], "cache_seqlens_dst": v[1:]})(i32(3, device=d)),
    ),
]


@pytest.mark.parametrize("case", SINGLE)
def test_single_call(case: Malformed, device: str) -> None:
    good = sglang_arguments(device, ("src", "dst"))
    good |= {"forward_mode": 1, "bs": 2, "max_len": 0, "max_seqlen_k": 20, "seqlens_expanded_size": 8}
    fused_metadata_copy_cuda(**good)  # the unchanged call is legal: it copies poison
    for name, tensor in good.items():
        if name.endswith("_src"):
            tensor.fill_(1)
    written = [tensor for name, tensor in good.items() if name.endswith("_dst")]
    check(
        case,
        "fused_metadata_copy_cuda",
        lambda: fused_metadata_copy_cuda(**{**good, **case.change(good, device)}),
        written,
    )


MULTI = [
    reject(
        "third destination",
        "page_indices_dst2: expected a shape of at least [2, 20], found [1, 20]",
        lambda a, d: {"page_indices_dst2": a["page_indices_dst2"][:1]},
    ),
    reject(
        "optional field of the second",
        "flashmla_num_splits_dst1: expected a tensor, since its source is given, found None",
        lambda a, d: {"flashmla_num_splits_dst1": None},
    ),
    reject(
        "expanded",
        "seqlens_expanded_size: expected bs (2) in DECODE, found 3",
        lambda a, d: {"seqlens_expanded_size": 3},
    ),
    reject("max_len", "max_len: expected 0 .. 2147483647, found -1", lambda a, d: {"max_len": -1}),
]


@pytest.mark.parametrize("case", MULTI)
def test_multi_call(case: Malformed, device: str) -> None:
    good = sglang_arguments(device, ("src", "dst0", "dst1", "dst2"))
    good |= {"bs": 2, "max_len": 20, "seqlens_expanded_size": 2}
    fused_metadata_copy_multi_cuda(**good)
    for name, tensor in good.items():
        if name.endswith("_src"):
            tensor.fill_(1)
    written = [tensor for name, tensor in good.items() if "_dst" in name]
    check(
        case,
        "fused_metadata_copy_multi_cuda",
        lambda: fused_metadata_copy_multi_cuda(**{**good, **case.change(good, device)}),
        written,
    )


# ---- devices ----------------------------------------------------------------------------------------------


def test_there_are_at_least_thirty_malformed_calls() -> None:
    assert len(COPY) + len(RUNS) + len(GENERATE) + len(SINGLE) + len(MULTI) >= 30


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
    with pytest.raises(RuntimeError, match="req_to_token: expected a tensor on cuda:0, found cpu"):
        good = good_arguments(cuda)
        NSAMetadataGeneratePlan(**{**good, "req_to_token": good["req_to_token"].cpu()})


def test_a_plan_of_another_operator_is_refused() -> None:
    plan = FusedMetadataCopyPlan([CopyRegion(i32(4, device="cpu"), (i32(4, device="cpu"),))])
    operators = torch.ops.sgl_kernel_nsa_cpu
    for wrong in (torch.zeros(8, dtype=torch.uint8), torch.zeros(100_000, dtype=torch.uint8), plan._plan):
        with pytest.raises(
            RuntimeError, match="nsa_metadata_generate: plan: expected a plan made by this operator"
        ):
            operators.nsa_metadata_generate_run(wrong)
    with pytest.raises(
        RuntimeError, match="fused_metadata_copy: plan: expected a plan made by this operator for cpu"
    ):
        operators.fused_metadata_copy_run(torch.zeros(0, dtype=torch.uint8), -1, -1)
