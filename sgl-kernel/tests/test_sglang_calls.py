"""fused_metadata_copy_cuda and fused_metadata_copy_multi_cuda: SGLang's calls, against torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import sgl_kernel
import torch
from arena import DECODE, DRAFT_EXTEND, TARGET_VERIFY, Arena, Slot, assert_same, fill_random


@dataclass(frozen=True)
class SGLangCase:
    mode: int
    bs: int
    max_len: int
    expanded: int
    max_seqlen_k: int = 0  # used outside DECODE
    page_size: int = 64
    optional: bool = True  # real page table and FlashMLA's fields are given
    wider: int = 0  # columns of a backend's table past the source's
    source_absent: bool = False  # the optional fields have destinations only
    destinations: int = 1

    @property
    def rows(self) -> int:
        return self.bs if self.mode == DECODE else self.expanded

    @property
    def cols(self) -> int:
        return self.max_len if self.mode == DECODE else self.max_seqlen_k

    @property
    def pages(self) -> int:
        return -(-self.cols // self.page_size)


Live = Callable[[SGLangCase], tuple[slice, ...]]


@dataclass(frozen=True)
class Field:
    name: str
    shape: Callable[[SGLangCase], tuple[int, ...]]  # of the source
    live: Live
    optional: bool = False
    multi: bool = True
    dst_name: str | None = None  # where it is another

    def argument(self, side: str) -> str:
        return f"{self.name if side == 'src' else self.dst_name or self.name}_{side}"


FIELDS = (
    Field("cache_seqlens", lambda c: (c.bs,), lambda c: (slice(c.bs),)),
    Field("cu_seqlens_k", lambda c: (c.bs + 1,), lambda c: (slice(1, c.bs + 1),)),
    Field(
        "page_indices",
        lambda c: (c.rows, c.cols),
        lambda c: (slice(c.rows), slice(c.cols)),
        dst_name="page_table_1",
    ),
    Field("nsa_cache_seqlens", lambda c: (c.expanded,), lambda c: (slice(c.expanded),)),
    Field("seqlens_expanded", lambda c: (c.expanded,), lambda c: (slice(c.expanded),), True, False),
    Field("nsa_cu_seqlens_k", lambda c: (c.expanded + 1,), lambda c: (slice(1, c.expanded + 1),)),
    Field("real_page_table", lambda c: (c.rows, c.pages), lambda c: (slice(c.rows), slice(c.pages)), True),
    Field("flashmla_num_splits", lambda c: (c.expanded + 1,), lambda c: (slice(c.expanded + 1),), True),
    Field("flashmla_metadata", lambda c: (132, 8), lambda c: (slice(132), slice(8)), True),
)

SINGLE = [
    SGLangCase(DECODE, 4, 130, 4),
    SGLangCase(DECODE, 33, 1000, 33, wider=24),
    SGLangCase(DECODE, 3, 64, 3, optional=False),
    SGLangCase(DECODE, 3, 64, 3, source_absent=True),
    SGLangCase(DECODE, 0, 0, 0),
    SGLangCase(DECODE, 1, 0, 1),
    SGLangCase(DECODE, 5, 65, 5, wider=3),
    SGLangCase(TARGET_VERIFY, 4, 0, 16, max_seqlen_k=130, wider=11),
    SGLangCase(TARGET_VERIFY, 2, 5, 8, max_seqlen_k=4095, optional=False),
    SGLangCase(DRAFT_EXTEND, 4, 0, 7, max_seqlen_k=200, wider=4),
    SGLangCase(DRAFT_EXTEND, 4, 0, 0, max_seqlen_k=200),
]
MULTI = [
    SGLangCase(DECODE, bs, max_len, bs, optional=optional, wider=wider, destinations=3)
    for bs, max_len, wider in ((0, 0, 0), (1, 1, 3), (4, 300, 0), (32, 4095, 64), (7, 65, 1))
    for optional in (True, False)
]


class SGLangRig:
    def __init__(self, case: SGLangCase, device: str) -> None:
        self.case, self.arena = case, Arena()
        multi = case.destinations > 1
        self.fields = [f for f in FIELDS if f.multi or not multi]
        self.sets: list[dict[str, Slot | None]] = [self._add_set("src", source=True)]
        suffixes = [f"dst{d}" for d in range(case.destinations)] if multi else ["dst"]
        self.sets += [self._add_set(suffix, source=False) for suffix in suffixes]
        self.names = ["src", *suffixes]
        self.fresh = self.arena.buffer()
        generator = torch.Generator().manual_seed(0)
        for slot in self.sets[0].values():
            if slot is not None:
                fill_random(slot.view(self.fresh), generator)
        self.buffer = self.fresh.to(device, copy=True)

    def _has(self, field: Field, source: bool) -> bool:
        if field.name == "seqlens_expanded":
            return self.case.mode != DECODE or not source
        return not field.optional or (self.case.optional and not (source and self.case.source_absent))

    def _add_set(self, suffix: str, source: bool) -> dict[str, Slot | None]:
        slots: dict[str, Slot | None] = {}
        for field in self.fields:
            shape = field.shape(self.case)
            if not source:  # a backend's buffers are at least as large
                wider = self.case.wider if field.name != "flashmla_metadata" else 0
                shape = (shape[0] + 2, shape[1] + wider) if len(shape) == 2 else (shape[0] + 2,)
            present = self._has(field, source)
            name = f"{field.name}_{suffix}"
            slots[field.name] = self.arena.add(name, shape, torch.int32) if present else None
        return slots

    def call(self, buffer: torch.Tensor) -> None:
        case = self.case
        tensors = {
            field.argument(suffix): slots[field.name].view(buffer) if slots[field.name] else None
            for suffix, slots in zip(self.names, self.sets, strict=True)
            for field in self.fields
        }
        integers = {"bs": case.bs, "max_len": case.max_len, "seqlens_expanded_size": case.expanded}
        if case.destinations > 1:
            sgl_kernel.fused_metadata_copy_multi_cuda(**tensors, **integers)
            return
        modes = {"forward_mode": case.mode, "max_seqlen_k": case.max_seqlen_k}
        sgl_kernel.fused_metadata_copy_cuda(**tensors, **integers, **modes)

    def expected(self) -> torch.Tensor:
        expected = self.fresh.clone()
        for field in self.fields:
            source = self.sets[0][field.name]
            for slots in self.sets[1:]:
                if source is not None:
                    live = field.live(self.case)
                    slots[field.name].view(expected)[live] = source.view(expected)[live]
        return expected


@pytest.mark.parametrize("case", SINGLE + MULTI)
def test_copies_the_live_part(case: SGLangCase, device: str) -> None:
    rig = SGLangRig(case, device)
    rig.call(rig.buffer)
    assert_same(rig.arena, rig.buffer, rig.expected(), case)


def test_names_and_order_are_sglangs() -> None:
    """Sources, destinations, integers, as SGLang passes them, by position or by name."""
    single = [f.argument(side) for side in ("src", "dst") for f in FIELDS]
    multi = [f.argument(side) for side in ("src", "dst0", "dst1", "dst2") for f in FIELDS if f.multi]
    names = {
        sgl_kernel.fused_metadata_copy_cuda: [
            *single,
            *("forward_mode", "bs", "max_len", "max_seqlen_k", "seqlens_expanded_size"),
        ],
        sgl_kernel.fused_metadata_copy_multi_cuda: [*multi, "bs", "max_len", "seqlens_expanded_size"],
    }
    for function, expected in names.items():
        assert list(inspect.signature(function).parameters) == expected


def test_source_may_be_its_own_destination(device: str) -> None:
    """SGLang's int32 seq_lens buffer is both the precomputed and the backends' cache_seqlens."""
    rig = SGLangRig(SGLangCase(DECODE, 4, 130, 4, optional=False), device)
    rig.sets[1]["cache_seqlens"] = rig.sets[0]["cache_seqlens"]
    rig.call(rig.buffer)
    assert_same(rig.arena, rig.buffer, rig.expected(), rig.case)


def good_arguments(device: str, **replaced: object) -> dict[str, object]:
    """A legal TARGET_VERIFY call of two requests of four rows: sources count up, destinations hold -1."""

    def tensor(*shape: int, written: bool) -> torch.Tensor:
        count = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device).view(shape)
        return torch.full_like(count, -1) if written else count

    shapes = {
        "cache_seqlens": (2,),
        "cu_seqlens_k": (3,),
        "page_indices": (8, 70),
        "nsa_cache_seqlens": (8,),
        "seqlens_expanded": (8,),
        "nsa_cu_seqlens_k": (9,),
        "real_page_table": (8, 2),
        "flashmla_num_splits": (9,),
        "flashmla_metadata": (4, 8),
    }
    tensors = {
        f.argument(side): tensor(*shapes[f.name], written=side == "dst")
        for side in ("src", "dst")
        for f in FIELDS
    }
    integers = {"forward_mode": 1, "bs": 2, "max_len": 0, "max_seqlen_k": 70, "seqlens_expanded_size": 8}
    return {**tensors, **integers, **replaced}


@pytest.mark.parametrize("shape", [(), (0,), (128,), (132, 8), (3, 5, 8), (2, 1, 3, 8)], ids=str)
def test_flashmla_metadata_of_any_rank(shape: tuple[int, ...], device: str) -> None:
    """An opaque tensor, 1-D in SGLang's own tests: its elements are copied in order. Two dimensions were
    demanded before."""
    source = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device).view(shape)
    for dst_shape in (shape, (source.numel() + 3,)):
        written = torch.full(dst_shape, -1, dtype=torch.int32, device=device)
        arguments = {"flashmla_metadata_src": source, "flashmla_metadata_dst": written}
        sgl_kernel.fused_metadata_copy_cuda(**good_arguments(device, **arguments))
        assert torch.equal(written.flatten()[: source.numel()], source.flatten())
        assert (written.flatten()[source.numel() :] == -1).all()


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_a_strided_source_is_made_contiguous(field: Field, device: str) -> None:
    """SGLang's wrapper calls contiguous() on its sources; they were refused before."""
    arguments = good_arguments(device)
    plain = arguments[field.argument("src")]
    strided = plain.new_full((*plain.shape[:-1], 3 * plain.shape[-1]), -5)[..., 1::3].copy_(plain)
    assert strided.stride(-1) == 3
    transposed = plain.t().contiguous().t() if plain.dim() == 2 else strided
    for source in (strided, transposed):
        arguments = good_arguments(device, **{field.argument("src"): source})
        sgl_kernel.fused_metadata_copy_cuda(**arguments)
        written = arguments[field.argument("dst")]
        skipped = int(field.name in ("cu_seqlens_k", "nsa_cu_seqlens_k"))  # element 0 of a prefix sum
        assert torch.equal(written[skipped:], plain[skipped:])


@pytest.mark.parametrize("rows", [0, 5, 8, 11])
@pytest.mark.parametrize("mode", [TARGET_VERIFY, DRAFT_EXTEND])
def test_rows_of_the_tables_are_those_of_the_source(mode: int, rows: int, device: str) -> None:
    """Outside DECODE, SGLang copies as many table rows as page_indices_src has; it was seqlens_expanded_size
    before."""
    tables = {"page_indices_src": (rows, 70), "page_table_1_dst": (12, 80)}
    tables |= {"real_page_table_src": (rows, 2), "real_page_table_dst": (12, 3)}
    replaced = {k: torch.randint(1, 99, v, dtype=torch.int32, device=device) for k, v in tables.items()}
    before = {k: t.clone() for k, t in replaced.items()}
    sgl_kernel.fused_metadata_copy_cuda(**good_arguments(device, forward_mode=mode, **replaced))
    for source, dst in (
        ("page_indices_src", "page_table_1_dst"),
        ("real_page_table_src", "real_page_table_dst"),
    ):
        expected = before[dst]
        expected[:rows, : before[source].shape[1]] = before[source]
        assert torch.equal(replaced[dst], expected)


def test_mutated_tensors_are_marked_in_the_schemas() -> None:
    assert sgl_kernel.available("cpu")
    for name in ("fused_metadata_copy", "fused_metadata_copy_multi"):
        for argument in getattr(torch.ops.sgl_kernel_nsa_cpu, name).default._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            assert written == ("_dst" in argument.name), argument.name
    for name in ("fused_metadata_copy_run", "nsa_metadata_generate_run"):
        plan = getattr(torch.ops.sgl_kernel_nsa_cpu, name).default._schema.arguments[0]
        assert plan.alias_info.is_write
