"""Malformed plans of nsa_metadata_generate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from malformed import Malformed, check, i32, reject
from sgl_kernel import (
    MetadataDestination,
    NSAMetadataGeneratePlan,
)


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


# `change` takes (the good arguments, device) and returns those to replace.
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
        "seqlens_offset",
        "destinations[1].seqlens_offset: expected -16777216 .. 16777216, found 16777217",
        with_field("seqlens_offset", lambda d: 2**24 + 1),
    ),
    reject(
        "a destination without fields",
        "destinations[1]: expected at least one tensor, found none",
        lambda a, d: {"destinations": [good_destination(d), MetadataDestination(seqlens_offset=1)]},
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


@pytest.mark.gpu
def test_mixed_devices(cuda: str) -> None:
    with pytest.raises(RuntimeError, match="req_to_token: expected a tensor on cuda:0, found cpu"):
        good = good_arguments(cuda)
        NSAMetadataGeneratePlan(**{**good, "req_to_token": good["req_to_token"].cpu()})
