"""Cases of the metadata kernels as data, and the plain-torch reference that every case is checked against.

All tensors of a case lie in one byte buffer (`Arena`), apart from each other and surrounded by poison. A
case runs on a copy of the buffer on the device, the reference on a copy on the CPU, and the two must be equal
to the last byte: one comparison sees live elements, untouched elements and untouched sources alike.
"""

from __future__ import annotations

import contextlib
import mmap
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import sgl_kernel
import torch

DECODE, TARGET_VERIFY, DRAFT_EXTEND = 0, 1, 2
POISON = 0xA5  # of every byte that is nobody's
DTYPES = (torch.int32, torch.int64, torch.uint8, torch.int16)

DrawInt = Callable[[int, int], int]  # both ends included: a random generator's, or hypothesis'


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in an arena; in elements of its dtype."""

    name: str
    offset: int
    shape: tuple[int, ...]
    row_stride: int
    dtype: torch.dtype

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        strides = (1,) if len(self.shape) == 1 else (self.row_stride, 1)
        return torch.as_strided(buffer.view(self.dtype), self.shape, strides, self.offset)


@dataclass
class Arena:
    slots: list[Slot] = field(default_factory=list)
    num_bytes: int = 64

    def add(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, extra: int = 0, shift: int = 0
    ) -> Slot:
        """Reserves a tensor: `extra` elements after each row, its start `shift` past a 16-byte boundary."""
        size = dtype.itemsize
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        start = (self.num_bytes + 15) // 16 * 16 + shift * size
        slot = Slot(name, start // size, shape, cols + extra, dtype)
        self.slots.append(slot)
        self.num_bytes = start + max(rows, 1) * (cols + extra) * size + 16
        return slot

    def buffer(self) -> torch.Tensor:
        return torch.full(((self.num_bytes + 15) // 16 * 16,), POISON, dtype=torch.uint8)

    def explain(self, found: torch.Tensor, expected: torch.Tensor) -> str:
        """Names the first tensor and element that differ."""
        for slot in self.slots:
            wrong = (slot.view(found) != slot.view(expected)).nonzero()
            if len(wrong):
                at = tuple(wrong[0].tolist())
                values = slot.view(found)[at].item(), slot.view(expected)[at].item()
                return f"{slot.name}{list(at)}: found {values[0]}, expected {values[1]} ({len(wrong)} differ)"
        first = int((found != expected).nonzero()[0])
        return f"byte {first} between the tensors was overwritten"


def assert_same(arena: Arena, found: torch.Tensor, expected: torch.Tensor, case: object) -> None:
    found = found.cpu()
    if not torch.equal(found, expected):
        raise AssertionError(f"{arena.explain(found, expected)} in {case}")


def fill_random(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random bytes, so that every bit of every element is copied."""
    limits = torch.iinfo(tensor.dtype)
    tensor.copy_(torch.randint(limits.min, limits.max, tensor.shape, generator=generator, dtype=tensor.dtype))


# ---- copy -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionSpec:
    """One region of a copy case; `dsts` gives (extra rows, extra columns, shift) of each destination."""

    name: str
    shape: tuple[int, ...]
    dsts: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype = torch.int32
    rows: str = "all"
    rows_extra: int = 0
    cols_per: int = 0
    src_extra: int = 0
    src_shift: int = 0

    def live(self, expanded_rows: int, max_len: int) -> tuple[slice, ...]:
        rows = (
            slice(None) if self.rows == "all" or expanded_rows < 0 else slice(expanded_rows + self.rows_extra)
        )
        if len(self.shape) == 1:
            return (rows,) if self.rows == "expanded" and expanded_rows >= 0 else (slice(self.shape[0]),)
        full = slice(self.shape[0]) if rows.stop is None else rows
        cols = self.shape[1] if self.cols_per == 0 or max_len < 0 else -(-max_len // self.cols_per)
        return (full, slice(cols))


@dataclass(frozen=True)
class CopyCase:
    regions: tuple[RegionSpec, ...]
    runs: tuple[tuple[int, int], ...] = ((-1, -1),)  # (expanded_rows, max_len) of each run of the one plan
    seed: int = 0


class CopyRig:
    """A copy case laid out on a device, with its plan."""

    def __init__(self, case: CopyCase, device: str) -> None:
        self.case, self.arena = case, Arena()
        self.slots: list[tuple[Slot, list[Slot]]] = []
        for r, spec in enumerate(case.regions):
            name = f"{r}:{spec.name}"
            src = self.arena.add(f"{name}.src", spec.shape, spec.dtype, spec.src_extra, spec.src_shift)
            dsts = []
            for d, (rows, cols, shift) in enumerate(spec.dsts):
                more = (cols,) if len(spec.shape) == 1 else (rows, cols)
                grown = tuple(a + b for a, b in zip(spec.shape, more, strict=True))
                dsts.append(self.arena.add(f"{name}.dst{d}", grown, spec.dtype, 0, shift))
            self.slots.append((src, dsts))
        self.fresh = self.arena.buffer()
        generator = torch.Generator().manual_seed(case.seed)
        for src, _ in self.slots:
            fill_random(src.view(self.fresh), generator)
        self.buffer = self.fresh.to(device, copy=True)
        self.plan = sgl_kernel.FusedMetadataCopyPlan(
            [
                sgl_kernel.CopyRegion(
                    src.view(self.buffer),
                    tuple(d.view(self.buffer) for d in dsts),
                    spec.rows,
                    spec.rows_extra,
                    spec.cols_per,
                )
                for spec, (src, dsts) in zip(case.regions, self.slots, strict=True)
            ]
        )

    def expected(self, expanded_rows: int, max_len: int) -> torch.Tensor:
        expected = self.fresh.clone()
        for spec, (src, dsts) in zip(self.case.regions, self.slots, strict=True):
            live = spec.live(expanded_rows, max_len)
            for dst in dsts:
                dst.view(expected)[live] = src.view(expected)[live]
        return expected

    def check(self) -> int:
        """Runs all runs of the case; returns how many."""
        for expanded_rows, max_len in self.case.runs:
            self.buffer.copy_(self.fresh)
            self.plan.run(expanded_rows, max_len)
            expected = self.expected(expanded_rows, max_len)
            assert_same(self.arena, self.buffer, expected, (self.case, expanded_rows, max_len))
        return len(self.case.runs)


def metadata_copy_case(
    mode: int,
    bs: int,
    max_len: int,
    *,
    n: int = 3,
    page_size: int = 64,
    rows_per_req: int = 1,
    expanded: int | None = None,
    wider: int = 0,
    shift: int = 0,
    real_page_table: bool = True,
    seqlens_expanded: bool = True,
    flashmla: bool = False,
    spare_cols: int = 0,
) -> CopyCase:
    """What a backend set needs copied, field by field. `spare_cols`: in the plan, but not in the run."""
    rows = bs * rows_per_req
    expanded = rows if expanded is None else expanded
    pages = -(-(max_len + spare_cols) // page_size)
    dsts = tuple((0, wider, shift) for _ in range(n))
    grown = tuple((2, wider, shift) for _ in range(n))
    regions = [
        RegionSpec("cache_seqlens", (bs,), dsts),
        RegionSpec("cu_seqlens_k", (bs + 1,), dsts),
        RegionSpec(
            "page_indices", (rows, max_len + spare_cols), grown, rows="expanded", cols_per=1, src_shift=shift
        ),
        RegionSpec("nsa_cache_seqlens", (rows,), dsts, rows="expanded"),
        RegionSpec("nsa_cu_seqlens_k", (rows + 1,), dsts, rows="expanded", rows_extra=1),
    ]
    if mode != DECODE and seqlens_expanded:
        regions.append(RegionSpec("seqlens_expanded", (rows,), dsts, rows="expanded"))
    if real_page_table and page_size > 1:
        regions.append(
            RegionSpec("real_page_table", (rows, pages), grown, rows="expanded", cols_per=page_size)
        )
    if flashmla:
        regions.append(RegionSpec("flashmla_metadata", (132, 8), dsts))
        regions.append(RegionSpec("num_splits", (rows + 1,), dsts, rows="expanded", rows_extra=1))
    return CopyCase(tuple(regions), ((expanded, max_len),))


def random_copy_case(draw: DrawInt, runs: int = 1) -> CopyCase:
    """Any regions of any dtype, alignment and extent."""
    most_dsts = draw(0, 7) if draw(0, 9) else draw(8, 20)
    regions = []
    for r in range(draw(1, 5) if draw(0, 9) else draw(6, 16)):
        dtype = DTYPES[(0, 0, 0, 1, 2, 3)[draw(0, 5)]]
        cols = draw(0, 70) if draw(0, 7) else draw(71, 3000)
        one_d = draw(0, 2) == 0
        shape = (cols,) if one_d else (draw(0, 9), cols)
        aligned = draw(0, 1) == 0  # every start and stride on 16 bytes, so that the wide path is taken often
        dsts = []
        for _ in range(most_dsts):
            extra = (16 - cols % 16) % 16 if aligned else draw(0, 5)
            dsts.append((draw(0, 2), extra, 0 if aligned else draw(0, 3)))
        expanded = draw(0, 1) == 1
        most_rows = cols if one_d else shape[0]
        regions.append(
            RegionSpec(
                f"region{r}",
                shape,
                tuple(dsts),
                dtype,
                "expanded" if expanded else "all",
                draw(0, min(1, most_rows)) if expanded else 0,
                0 if one_d else (0, 1, 7, 64)[draw(0, 3)],
                (16 - cols % 16) % 16 if aligned else draw(0, 3),
                0 if aligned else draw(0, 3),
            )
        )
    most_rows = [s.shape[0] - s.rows_extra for s in regions if s.rows == "expanded"]
    most_len = [s.shape[1] * s.cols_per for s in regions if s.cols_per > 0]
    extents = tuple(
        (draw(-1, min(most_rows, default=9)), draw(-1, min(most_len, default=9))) for _ in range(runs)
    )
    return CopyCase(tuple(regions), extents, draw(0, 1000))


# ---- generate ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DestinationSpec:
    seqlens_offset: int = 0
    width1: int = 64
    width2: int | None = None  # None: no real_page_table
    seqlens_expanded: bool = True
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
    hostile: bool = False  # pool indices and accept lengths out of their range
    seed: int = 0


@dataclass(frozen=True)
class DestinationSlots:
    cache_seqlens: Slot  # [bs + 3], int32, as all fields
    cu_seqlens_k: Slot  # [bs + 4]
    page_table_1: Slot  # [rows + 1, width1]
    nsa_cache_seqlens: Slot  # [rows + 2]
    nsa_cu_seqlens_k: Slot  # [rows + 1]
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
        tokens = self.req_to_token.view(self.fresh)
        tokens.copy_(torch.randint(-5 if case.hostile else 0, 2**31 - 1, shape, generator=self.generator))
        self.set_run(0)
        self.buffer = self.fresh.to(device, copy=True)
        self.plan = self._make_plan()

    def _add_destination(
        self, name: str, spec: DestinationSpec, before: DestinationSlots | None
    ) -> DestinationSlots:
        case, int32 = self.case, torch.int32
        rows = case.bs * case.rows_per_req

        def vector(field_name: str, size: int) -> Slot:
            return self.arena.add(f"{name}.{field_name}", (size,), int32, 0, spec.shift)

        def table(field_name: str, width: int) -> Slot:
            return self.arena.add(f"{name}.{field_name}", (rows + 1, width), int32, spec.extra, spec.shift)

        shared = before if spec.shares_tables else None
        page_table_1 = shared.page_table_1 if shared else table("page_table_1", spec.width1)
        if shared:
            real_page_table = shared.real_page_table
        else:
            real_page_table = table("real_page_table", spec.width2) if spec.width2 is not None else None
        return DestinationSlots(
            vector("cache_seqlens", case.bs + 3),
            vector("cu_seqlens_k", case.bs + 4),
            page_table_1,
            vector("nsa_cache_seqlens", rows + 2),
            vector("nsa_cu_seqlens_k", rows + 1),
            vector("seqlens_expanded", rows + 2) if spec.seqlens_expanded else None,
            real_page_table,
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
        """Runs every run of the case through the one plan, the last one twice; returns how many."""
        for run in range(len(self.case.seq_lens)):
            if run > 0:
                self.set_run(run)
            self.buffer.copy_(self.fresh)
            self.plan.run()
            assert_same(self.arena, self.buffer, self.expected(), (self.case, run))
        self.plan.run()
        assert_same(self.arena, self.buffer, self.expected(), (self.case, "run twice"))
        return len(self.case.seq_lens)


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
    kv = (seq_lens.long() + offset).clamp(min=0)  # [bs]
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
    rows = len(lens)

    cached = kv + per_req if case.mode == TARGET_VERIFY else kv
    sparse = lens.clamp(max=case.topk)
    dst["cache_seqlens"][:bs] = cached.int()
    dst["cu_seqlens_k"][: bs + 1] = torch.nn.functional.pad(cached.cumsum(0), (1, 0)).int()
    dst["nsa_cache_seqlens"][:rows] = sparse.int()
    dst["nsa_cu_seqlens_k"][: rows + 1] = torch.nn.functional.pad(sparse.cumsum(0), (1, 0)).int()
    if dst["seqlens_expanded"] is not None:
        dst["seqlens_expanded"][:rows] = lens.int()

    safe = torch.where((indices >= 0) & (indices < case.pool), indices.long(), 0)
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
    """One destination per offset (`offsets`), wide enough for all lengths, which are dealt out in turn."""
    offsets = tuple(options.pop("offsets", (0,)))
    page_size = options.get("page_size", 64)
    width = options.pop("width", max(lengths, default=0) + max(offsets) + options.get("rows_per_req", 1) + 1)
    width = max(width, 1)
    pages = -(-width // page_size) if options.pop("real_page_table", True) else None
    keys = ("extra", "shift", "seqlens_expanded")
    spec = {key: options.pop(key) for key in keys if key in options}
    dsts = tuple(DestinationSpec(offset, width, pages, **spec) for offset in offsets)
    dealt = tuple(lengths[i % len(lengths)] for i in range(bs))
    return GenerateCase(mode, bs, dsts, (dealt, tuple(reversed(dealt))), token_width=width, **options)


def random_generate_case(draw: DrawInt, runs: int = 1) -> GenerateCase:
    mode = draw(0, 2)
    bs = draw(0, 9) if draw(0, 15) else draw(10, 600)
    page_size = (1, 2, 3, 16, 64)[draw(0, 4)]
    token_width = (draw(1, 40) if bs < 10 else 8) if draw(0, 4) else (draw(41, 3000) if bs < 10 else 64)
    most = -(-token_width // page_size)
    hostile = draw(0, 3) == 0
    aligned = draw(0, 1) == 0
    token_extra = (-token_width) % 4 if aligned else draw(0, 5)
    dsts: list[DestinationSpec] = []
    for d in range(draw(0, 4) if draw(0, 15) else draw(5, 40)):
        width1 = token_width if draw(0, 1) else draw(0, token_width)
        dsts.append(
            DestinationSpec(
                seqlens_offset=draw(-5, 5) if hostile else draw(0, 1) * (d + 1),
                width1=width1,
                width2=None if draw(0, 2) == 0 else (most if draw(0, 1) else draw(0, most)),
                seqlens_expanded=draw(0, 1) == 1,
                extra=(-width1) % 4 if aligned else draw(0, 5),
                shift=0 if aligned else draw(0, 3),
                shares_tables=d > 0 and draw(0, 5) == 0,
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
        hostile=hostile,
        seed=draw(0, 1000),
    )


@contextlib.contextmanager
def huge_table(rows: int, width: int, device: str) -> Iterator[torch.Tensor]:
    """Zeros, [rows, width], int32. On the CPU: address space of which only the touched pages take memory."""
    if device != "cpu":
        yield torch.zeros(rows, width, dtype=torch.int32, device=device)
        return
    map_noreserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_noreserve
    memory = mmap.mmap(-1, rows * width * 4, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    yield torch.frombuffer(memory, dtype=torch.int32).view(rows, width)
