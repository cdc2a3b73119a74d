"""nsa_metadata_generate against plain torch, with poison around everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sgl_kernel
import torch
from arena import DECODE, DRAFT_EXTEND, TARGET_VERIFY, assert_same, huge_table
from generate_cases import FIELDS, VECTORS, DestinationSpec, GenerateCase, GenerateRig, generate_case

LENGTHS = (0, 1, 5, 63, 64, 65, 200, 1)
MODES = [
    {"mode": DECODE},
    {"mode": TARGET_VERIFY, "rows_per_req": 4},
    {"mode": DRAFT_EXTEND, "rows_per_req": 4},
    {"mode": DRAFT_EXTEND, "rows_per_req": 4, "packed": True},
]
STEPS = {n: tuple(range(1, n + 1)) for n in (1, 3, 7, 16, 32, 33, 70)}

CORRECTNESS = [
    *[generate_case(bs=6, lengths=LENGTHS, **mode) for mode in MODES],
    *[generate_case(bs=6, lengths=LENGTHS, offsets=STEPS[3], topk=64, **mode) for mode in MODES],
    *[generate_case(bs=5, lengths=LENGTHS, page_size=1, **mode) for mode in MODES],
    *[generate_case(bs=5, lengths=LENGTHS, page_size=3, extra=2, shift=1, **mode) for mode in MODES],
    *[generate_case(DECODE, 4, LENGTHS, offsets=offsets) for offsets in STEPS.values()],
    *[generate_case(bs=5, lengths=LENGTHS, fields=(field,), **mode) for field in FIELDS for mode in MODES],
    *[generate_case(DECODE, 5, LENGTHS, fields=tuple(f for f in FIELDS if f != field)) for field in FIELDS],
    *[generate_case(bs=300, lengths=LENGTHS, offsets=STEPS[3], fields=VECTORS, **mode) for mode in MODES],
    generate_case(DECODE, 5, LENGTHS, seq_lens_dtype=torch.int64, req_pool_indices_dtype=torch.int64),
]
CORNER = [
    *[generate_case(bs=bs, lengths=LENGTHS, **mode) for mode in MODES for bs in (0, 1, 33)],
    *[generate_case(DECODE, 3, (n, 1), page_size=page) for n in (0, 1, 63, 64, 65, 4095) for page in (1, 64)],
    *[generate_case(bs=4, lengths=(500,), width=100, **mode) for mode in MODES],  # lengths past the tables
    *[
        generate_case(bs=6, lengths=(-9, 3, -(2**31), 70), hostile=True, offsets=(-4, 0, 5), **mode)
        for mode in MODES
    ],
    GenerateCase(
        DECODE, 3, (DestinationSpec(0, 0, None), DestinationSpec(0, 10, 2)), ((9, 80, 100),), token_width=100
    ),
    GenerateCase(
        TARGET_VERIFY,
        3,
        (
            DestinationSpec(1, 100, 2),
            DestinationSpec(3, shares_tables=True),
            DestinationSpec(2, shares_tables=True),
        ),
        ((9, 80, 100), (50, 0, 90)),
        rows_per_req=2,
        token_width=100,
    ),
    GenerateCase(DECODE, 4, (), ((1, 2, 3, 4),)),
    # Lengths that no pool has: with the larger offset the sum once left 64 bits, and CUDA wrote no table.
    *[
        generate_case(
            bs=5,
            lengths=(2**63 - 1, 2**31, -(2**63), 2**30, 7),
            width=70,
            offsets=(0, 1),
            seq_lens_dtype=torch.int64,
            **mode,
        )
        for mode in MODES
    ],
    generate_case(DECODE, 3, (2**31 - 1, -(2**31), 2**30 + 1), width=70, offsets=(2**24, -(2**24))),
    # Tables of different widths, aligned and not, over several tiles.
    *[
        GenerateCase(
            bs=7,
            dsts=(DestinationSpec(1, 9000, 141), DestinationSpec(2, 2500, 40), DestinationSpec(0, None, 100)),
            seq_lens=((9000, 2048, 2047, 4096, 1, 6143, 8191), (0, 9, 0, 5000, 9000, 2049, 4097)),
            token_width=9000,
            token_extra=extra,
            **mode,
        )
        for mode in MODES
        for extra in (0, 1)
    ],
]
# Tiles that all rows have whole, of the first chunks and of those behind them. Page numbers come from
# registers where the page size is 16 or more and 4 divides it.
WHOLE_TILES = [
    GenerateCase(
        bs=3,
        dsts=(
            DestinationSpec(1, 16384, -(-16384 // page)),
            DestinationSpec(0, 16384, 7),
            DestinationSpec(0, None, min(16, -(-16384 // page))),
        ),
        seq_lens=((16300, 4096, 12287), (2047, 16000, 2048)),
        token_width=16384,
        page_size=page,
        **mode,
    )
    for mode in MODES
    for page in (4, 8, 12, 16, 18, 20, 64, 100, 512, 1028, 2048)
]
LARGE = [
    generate_case(DECODE, 2, (131072, 70000), offsets=(0, 1)),
    generate_case(DECODE, 32, (16384, 9000), offsets=STEPS[3]),
]
# For their vectors, whose code does not know of whole pages.
MANY_ROWS = [
    generate_case(DECODE, 4096, (7, 3, 0, 9), width=16),
    generate_case(TARGET_VERIFY, 1500, (7, 3, 0, 9), width=16, rows_per_req=4),
    generate_case(DRAFT_EXTEND, 1500, (7, 3, 0, 9), width=16, rows_per_req=4, packed=True),
]
TABLES = CORRECTNESS + CORNER + WHOLE_TILES + LARGE
WHOLE_PAGES = [replace(case, whole_pages=True) for case in TABLES]


@pytest.mark.parametrize("case", [*TABLES, *MANY_ROWS, *WHOLE_PAGES])
def test_generate(case: GenerateCase, device: str) -> None:
    rig = GenerateRig(case, device)
    rig.check()
    assert rig.plan.launches == -(-len(case.dsts) // 32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("layout", "by_page"),
    [
        *(({"page_size": page}, True) for page in (4, 16, 64)),
        ({"page_size": 64, "token_shift": 1, "token_extra": 1}, True),
        ({"page_size": 64, "shift": 1}, False),
        ({"page_size": 16, "extra": 2}, False),
        *(({"page_size": page}, False) for page in (1, 2, 12)),
    ],
)
def test_one_slot_of_each_page_is_read(
    layout: dict[str, int], by_page: bool, mode: dict[str, int], device: str
) -> None:
    """Slots that no whole page has: columns follow from the first of their page where the plan says that it
    reads no other, and are copied where it does not."""
    case = generate_case(
        bs=5, lengths=(700, 64, 1, 130, 2100), width=2112, whole_pages=True, **layout, **mode
    )
    rig = GenerateRig(case, device)
    tokens = rig.req_to_token.view(rig.fresh)
    in_page = torch.arange(tokens.shape[1]) % case.page_size
    tokens[:, in_page > 0] = -77
    expected = rig.expected()
    if by_page:
        table = rig.dsts[0].page_table_1.view(expected)
        follows = table[:, torch.arange(tokens.shape[1]) - in_page] + in_page
        table.copy_(torch.where(table == -77, follows, table))
    rig.buffer.copy_(rig.fresh)
    rig.plan.run()
    assert_same(rig.arena, rig.buffer, expected, case)


def test_pages_alone_need_one_slot_of_each(device: str) -> None:
    """Where no slots are wanted the others are not looked at: no word of whole pages is needed."""
    fields = ("real_page_table", "cache_seqlens")
    for page_size in (16, 64, 4, 3):
        case = generate_case(DECODE, 5, (700, 64, 1, 130, 2100), page_size=page_size, fields=fields)
        GenerateRig(case, device).check()


def test_tables_four_mebibytes_apart(device: str) -> None:
    """A page table of 2048 rows x 1,048,576 columns, of which each row uses a few."""
    rows, width = 2048, 1 << 20

    def vector(size: int, value: int = 0) -> torch.Tensor:
        return torch.full((size,), value, dtype=torch.int32, device=device)

    with huge_table(rows, width, device) as table:
        vectors = vector(rows), vector(rows + 1), table, vector(rows), vector(rows + 1)
        sgl_kernel.NSAMetadataGeneratePlan(
            mode=DECODE,
            bs=rows,
            seq_lens=vector(rows, 3),
            req_pool_indices=vector(rows),
            req_to_token=torch.arange(1, width + 1, dtype=torch.int32, device=device).view(1, width),
            destinations=[sgl_kernel.MetadataDestination(*vectors)],
            page_size=64,
            topk=2048,
        ).run()
        expected = torch.tensor([[1, 2, 3, 0]], dtype=torch.int32)
        assert torch.equal(table[:, :4].cpu(), expected.expand(rows, 4))
