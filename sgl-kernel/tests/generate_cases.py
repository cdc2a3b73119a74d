"""Generation cases as data, and the plain-torch reference that each is checked against."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

import sgl_kernel
import torch
from arena import DECODE, DRAFT_EXTEND, TARGET_VERIFY, Arena, DrawInt, Slot, assert_same

VECTORS = ("cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k", "seqlens_expanded")
FIELDS = (*VECTORS, "page_table_1", "real_page_table")


@dataclass(frozen=True)
class DestinationSpec:
    seqlens_offset: int = 0
    width1: int | None = 64  # None: no page_table_1
    width2: int | None = None  # None: no real_page_table
    without: tuple[str, ...] = ()  # vectors that this destination does not have
    extra: int = 0  # columns between the rows of the tables
    shift: int = 0
    shares_tables: bool = False  # with the destination before


@dataclass(frozen=True)
class GenerateCase:
    mode: int
    bs: int
    dsts: tuple[DestinationSpec, ...]
    seq_lens: tuple[tuple[int, ...], ...]  # of each run
    page_size: int = 64
    topk: int = 2048
    rows_per_req: int = 1
    packed: bool = False
    token_width: int = 64
    token_extra: int = 0
    token_shift: int = 0
    pool: int = 8
    seq_lens_dtype: torch.dtype = torch.int32
    req_pool_indices_dtype: torch.dtype = torch.int32
    whole_pages: bool = False  # of tokens, and the plan is told so
    hostile: bool = False  # pool indices and accept lengths out of their range
    seed: int = 0


@dataclass(frozen=True)
class DestinationSlots:
    cache_seqlens: Slot | None  # [bs + 3], int32, as all fields
    cu_seqlens_k: Slot | None  # [bs + 4]
    page_table_1: Slot | None  # [rows + 1, width1]
    nsa_cache_seqlens: Slot | None  # [rows + 2]
    nsa_cu_seqlens_k: Slot | None  # [rows + 1]
    seqlens_expanded: Slot | None  # [rows + 2]
    real_page_table: Slot | None  # [rows + 1, width2]

    def tensors(self, buffer: torch.Tensor) -> dict[str, torch.Tensor | None]:
        return {name: slot.view(buffer) if slot else None for name, slot in vars(self).items()}


class GenerateRig:
    """A generation case laid out on a device, with its plan."""

    def __init__(self, case: GenerateCase, device: str) -> None:
        self.case, self.arena = case, Arena()
        self.generator = torch.Generator().manual_seed(case.seed)
        add, int32 = self.arena.add, torch.int32
        self.seq_lens = add("seq_lens", (case.bs,), case.seq_lens_dtype)
        self.req_pool_indices = add("req_pool_indices", (case.bs,), case.req_pool_indices_dtype)
        self.accept_lens = add("accept_lens", (case.bs,), int32) if case.mode == DRAFT_EXTEND else None
        shape = (case.pool, case.token_width)
        self.req_to_token = add("req_to_token", shape, int32, case.token_extra, case.token_shift)
        self.dsts: list[DestinationSlots] = []
        for d, spec in enumerate(case.dsts):
            self.dsts.append(self._add_destination(f"dst{d}", spec, self.dsts[-1] if self.dsts else None))
        self.fresh = self.arena.buffer()
        self.req_to_token.view(self.fresh).copy_(self._random_tokens())
        self.set_run(0)
        self.buffer = self.fresh.to(device, copy=True)
        self.plan = self._make_plan()

    def _random_tokens(self) -> torch.Tensor:  # [pool, token_width], int64
        case = self.case
        page_size = case.page_size if case.whole_pages else 1
        shape = (case.pool, -(-case.token_width // page_size))
        low, high = -5 if case.hostile else 0, (2**31 - 1) // page_size
        pages = torch.randint(low, high, shape, generator=self.generator)
        tokens = pages[:, :, None] * page_size + torch.arange(page_size)
        return tokens.view(case.pool, -1)[:, : case.token_width]

    def _add_destination(
        self, name: str, spec: DestinationSpec, before: DestinationSlots | None
    ) -> DestinationSlots:
        case, int32 = self.case, torch.int32
        rows = case.bs * case.rows_per_req

        def vector(field_name: str, size: int) -> Slot | None:
            if field_name in spec.without:
                return None
            return self.arena.add(f"{name}.{field_name}", (size,), int32, 0, spec.shift)

        def table(field_name: str, width: int | None) -> Slot | None:
            if spec.shares_tables and before:
                return getattr(before, field_name)
            if width is None:
                return None
            return self.arena.add(f"{name}.{field_name}", (rows + 1, width), int32, spec.extra, spec.shift)

        return DestinationSlots(
            vector("cache_seqlens", case.bs + 3),
            vector("cu_seqlens_k", case.bs + 4),
            table("page_table_1", spec.width1),
            vector("nsa_cache_seqlens", rows + 2),
            vector("nsa_cu_seqlens_k", rows + 1),
            vector("seqlens_expanded", rows + 2),
            table("real_page_table", spec.width2),
        )

    def _make_plan(self) -> sgl_kernel.NSAMetadataGeneratePlan:
        case, buffer = self.case, self.buffer
        return sgl_kernel.NSAMetadataGeneratePlan(
            mode=case.mode,
            bs=case.bs,
            seq_lens=self.seq_lens.view(buffer),
            req_pool_indices=self.req_pool_indices.view(buffer),
            req_to_token=self.req_to_token.view(buffer),
            destinations=[
                sgl_kernel.MetadataDestination(**slots.tensors(buffer), seqlens_offset=spec.seqlens_offset)
                for spec, slots in zip(case.dsts, self.dsts, strict=True)
            ],
            page_size=case.page_size,
            topk=case.topk,
            rows_per_req=case.rows_per_req,
            accept_lens=self.accept_lens.view(buffer) if self.accept_lens else None,
            packed=case.packed,
            whole_pages=case.whole_pages,
        )

    def set_run(self, run: int) -> None:
        """Writes the inputs of a run into `fresh`: its lengths, new pool indices, new accept lengths."""
        case = self.case
        self.seq_lens.view(self.fresh).copy_(torch.tensor(case.seq_lens[run], dtype=case.seq_lens_dtype))
        low, high = (-3, case.pool + 3) if case.hostile else (0, case.pool)
        indices = torch.randint(low, high, (case.bs,), generator=self.generator)
        self.req_pool_indices.view(self.fresh).copy_(indices)
        if self.accept_lens:
            low, high = (-2, case.rows_per_req + 3) if case.hostile else (0, case.rows_per_req + 1)
            self.accept_lens.view(self.fresh).copy_(
                torch.randint(low, high, (case.bs,), generator=self.generator)
            )

    def expected(self) -> torch.Tensor:
        """The plain-torch reference, on the inputs in `fresh`."""
        case, expected = self.case, self.fresh.clone()
        inputs = {"seq_lens": self.seq_lens, "indices": self.req_pool_indices, "tokens": self.req_to_token}
        views = {name: slot.view(expected) for name, slot in inputs.items()}
        accepted = (
            self.accept_lens.view(expected) if self.accept_lens else torch.zeros(case.bs, dtype=torch.int32)
        )
        for spec, slots in zip(case.dsts, self.dsts, strict=True):
            write_reference(
                case, spec.seqlens_offset, **views, accepted=accepted, dst=slots.tensors(expected)
            )
        return expected

    def check(self) -> int:
        """Runs every run of the case through the one plan, without a bound of the lengths and with one, which
        in two of three cases is wrong, the last one twice; returns how many runs there were."""
        for run in range(len(self.case.seq_lens)):
            if run > 0:
                self.set_run(run)
            expected, longest = self.expected(), self.longest_row(run)
            for max_len in (-1, (longest, longest // 3, 0)[(run + self.case.bs) % 3]):
                self.buffer.copy_(self.fresh)
                self.plan.run(max_len)
                assert_same(self.arena, self.buffer, expected, (self.case, run, max_len))
        self.plan.run()
        assert_same(self.arena, self.buffer, expected, (self.case, "run twice"))
        return len(self.case.seq_lens)

    def longest_row(self, run: int) -> int:
        """A bound of the rows' lengths."""
        offset = max((dst.seqlens_offset for dst in self.case.dsts), default=0)
        return max(min(max(self.case.seq_lens[run], default=0), 2**30) + offset, 0) + self.case.rows_per_req


def write_reference(
    case: GenerateCase,
    offset: int,
    *,
    seq_lens: torch.Tensor,
    indices: torch.Tensor,
    tokens: torch.Tensor,
    accepted: torch.Tensor,
    dst: dict[str, torch.Tensor | None],
) -> None:
    """All metadata of one destination, in torch, on the CPU."""
    bs, per_req = case.bs, case.rows_per_req
    kv = (seq_lens.long().clamp(-(2**30), 2**30) + offset).clamp(min=0)  # [bs]
    accepted = accepted.long().clamp(0, per_req)  # [bs]
    column = torch.arange(per_req)
    if case.mode == TARGET_VERIFY:
        lens = kv[:, None] + 1 + column
    elif case.mode == DRAFT_EXTEND:
        lens = (kv[:, None] - accepted[:, None] + 1 + column).clamp(min=0) * (column < accepted[:, None])
    else:
        lens = kv[:, None]
    requests = torch.arange(bs)[:, None].expand(bs, per_req)
    if case.packed:
        kept = column < accepted[:, None]
        lens, requests = lens[kept], requests[kept]
    lens, requests = lens.reshape(-1), requests.reshape(-1)  # [rows]

    cached = kv + per_req if case.mode == TARGET_VERIFY else kv
    sparse = lens.clamp(max=case.topk)
    vectors = {
        "cache_seqlens": cached,
        "cu_seqlens_k": torch.nn.functional.pad(cached.cumsum(0), (1, 0)),
        "nsa_cache_seqlens": sparse,
        "nsa_cu_seqlens_k": torch.nn.functional.pad(sparse.cumsum(0), (1, 0)),
        "seqlens_expanded": lens,
    }
    for name, values in vectors.items():
        if dst[name] is not None:
            dst[name][: len(values)] = values.int()

    safe = torch.where((indices >= 0) & (indices < case.pool), indices.long(), 0)
    if dst["page_table_1"] is not None:
        write_live(dst["page_table_1"], tokens[safe[requests]], lens)
    if dst["real_page_table"] is not None:
        pages = tokens[:, :: case.page_size] // case.page_size
        write_live(dst["real_page_table"], pages[safe[requests]], -(-lens // case.page_size))


def write_live(table: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor) -> None:
    """Row r of `rows` into row r of `table`, as far as lens[r], both widths permitting."""
    width = min(table.shape[1], rows.shape[1])
    live = torch.arange(width) < lens[:, None]
    part = table[: len(rows), :width]
    part[live] = rows[:, :width][live]


def generate_case(mode: int, bs: int, lengths: tuple[int, ...], **options: object) -> GenerateCase:
    """One destination per offset (`offsets`), wide enough for all lengths, which are dealt out in turn; with
    the fields named in `fields`."""
    offsets = tuple(options.pop("offsets", (0,)))
    page_size = options.get("page_size", 64)
    width = options.pop("width", max(lengths, default=0) + max(offsets) + options.get("rows_per_req", 1) + 1)
    width = max(width, 1)
    fields = options.pop("fields", FIELDS)
    width1 = width if "page_table_1" in fields else None
    width2 = -(-width // page_size) if "real_page_table" in fields else None
    spec = {key: options.pop(key) for key in ("extra", "shift") if key in options}
    spec["without"] = tuple(name for name in VECTORS if name not in fields)
    dsts = tuple(DestinationSpec(offset, width1, width2, **spec) for offset in offsets)
    dealt = tuple(lengths[i % len(lengths)] for i in range(bs))
    return GenerateCase(mode, bs, dsts, (dealt, tuple(reversed(dealt))), token_width=width, **options)


def random_generate_case(draw: DrawInt, runs: int = 1) -> GenerateCase:
    mode = draw(0, 2)
    bs = draw(0, 9) if draw(0, 15) else draw(10, 600)
    page_size = (1, 2, 3, 16, 64, 4)[draw(0, 5)]
    whole_pages = draw(0, 1) == 1
    token_width = (draw(1, 40) if bs < 10 else 8) if draw(0, 4) else (draw(41, 3000) if bs < 10 else 64)
    most = -(-token_width // page_size)
    hostile = draw(0, 3) == 0
    aligned = draw(0, 1) == 0
    token_extra = (-token_width) % 4 if aligned else draw(0, 5)
    dsts: list[DestinationSpec] = []
    for d in range(draw(0, 4) if draw(0, 15) else draw(5, 40)):
        width1 = token_width if draw(0, 1) else draw(0, token_width)
        has_table = draw(0, 5) > 0
        shares_tables = d > 0 and draw(0, 5) == 0  # with one that may have none
        fewest = 0 if has_table and not shares_tables else 1  # a destination has something
        kept = draw(fewest, 31) if draw(0, 2) == 0 else 31  # bit i: has VECTORS[i]
        dsts.append(
            DestinationSpec(
                seqlens_offset=draw(-5, 5) if hostile else draw(0, 1) * (d + 1),
                width1=width1 if has_table else None,
                width2=None if draw(0, 2) == 0 else (most if draw(0, 1) else draw(0, most)),
                without=tuple(name for i, name in enumerate(VECTORS) if kept >> i & 1 == 0),
                extra=(-width1) % 4 if aligned else draw(0, 5),
                shift=0 if aligned else draw(0, 3),
                shares_tables=shares_tables,
            )
        )
    longest = token_width + (20 if hostile else 0)
    many = random.Random(draw(0, 1 << 30)).randint  # lengths of large batches: not worth shrinking one by one
    length = partial(draw if bs < 10 else many, -4 if hostile else 0, longest)
    seq_lens = tuple(tuple(length() for _ in range(bs)) for _ in range(runs))
    return GenerateCase(
        mode,
        bs,
        tuple(dsts),
        seq_lens,
        page_size=page_size,
        topk=(1, 7, 64, 2048)[draw(0, 3)],
        rows_per_req=1 if mode == DECODE else draw(1, 6),
        packed=mode == DRAFT_EXTEND and draw(0, 1) == 1,
        token_width=token_width,
        token_extra=token_extra,
        token_shift=0 if aligned else draw(0, 3),
        pool=draw(1, 6),
        seq_lens_dtype=(torch.int32, torch.int64)[draw(0, 1)],
        req_pool_indices_dtype=(torch.int32, torch.int64)[draw(0, 1)],
        whole_pages=whole_pages,
        hostile=hostile,
        seed=draw(0, 1000),
    )
