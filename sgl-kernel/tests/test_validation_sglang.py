"""Malformed calls of the operators under SGLang's names."""

from __future__ import annotations

import pytest
from malformed import Malformed, check, i32, reject
from sgl_kernel import (
    fused_metadata_copy_cuda,
    fused_metadata_copy_multi_cuda,
)


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

    def argument(name: str, side: str) -> str:
        return f"{name}_{side}" if side == "src" else f"{name}_{side}".replace("page_indices", "page_table_1")

    return {
        argument(name, side): i32(*shape, device=device) for side in sides for name, shape in shapes.items()
    }


# `change` takes (the good arguments, device) and returns those to replace.
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
        "nsa_cache_seqlens_src: expected a shape of at least [9], found [8]",
        lambda a, d: {"seqlens_expanded_size": 9},
    ),
    reject(
        "rows past the destination",
        "page_table_1_dst: expected a shape of at least [8, 20], found [7, 20]",
        lambda a, d: {"page_table_1_dst": a["page_table_1_dst"][:7]},
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
        "Tensor nsa_cu_seqlens_k_dst must have dtype int32, found int64",
        lambda a, d: {"nsa_cu_seqlens_k_dst": a["nsa_cu_seqlens_k_dst"].long()},
    ),
    reject(
        "dtype of FlashMLA's source",
        "Tensor flashmla_metadata_src must have dtype int32, found float32",
        lambda a, d: {"flashmla_metadata_src": a["flashmla_metadata_src"].float()},
    ),
    reject(
        "elements of FlashMLA's destination",
        "flashmla_metadata_dst: expected a shape of at least [32], found [31]",
        lambda a, d: {"flashmla_metadata_dst": i32(31, device=d)},
    ),
    reject(
        "FlashMLA's destination in pieces",
        "flashmla_metadata_dst: expected a contiguous tensor, found one with gaps",
        lambda a, d: {"flashmla_metadata_dst": i32(4, 9, device=d)[:, :8]},
    ),
    reject(
        "strided destination",
        "cache_seqlens_dst: expected an inner stride of 1, found 2",
        lambda a, d: {"cache_seqlens_dst": i32(4, device=d)[::2]},
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
        "page_table_1_dst2: expected a shape of at least [2, 20], found [1, 20]",
        lambda a, d: {"page_table_1_dst2": a["page_table_1_dst2"][:1]},
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
