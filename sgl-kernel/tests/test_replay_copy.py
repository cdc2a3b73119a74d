"""ReplayCopyPlan and fused_copy_replay_data against plain torch, and what they refuse."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import sgl_kernel
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import POISON
from replay_cases import SIX, FieldSpec, ReplayCase, ReplayRig, random_replay_case, six_fields

CASES = [
    ReplayCase(six_fields(), 1, 1, ((1, 1), (1, 0), (0, 0), (0, 1))),
    ReplayCase(six_fields(), 8, 64, ((8, 64), (1, 64), (3, 1), (8, 63), (0, 5))),
    ReplayCase(six_fields(), 256, 700, ((256, 700), (1, 700), (64, 257), (255, 4))),
    ReplayCase(six_fields(src_gap=3, dst_wider=5, dst_rows=2), 16, 100, ((16, 100), (5, 33))),
    ReplayCase(six_fields(src_shift=1, dst_shift=3), 16, 100, ((16, 100), (5, 33))),
    ReplayCase(six_fields(), 2, 40960, ((2, 40960), (2, 40959))),
    ReplayCase(
        (*six_fields()[:2], six_fields()[3]), 32, 1, ((32, 0), (7, 0))
    ),  # a backend without page tables
    ReplayCase((FieldSpec("lengths"),), 4, 1, ((4, 0),)),
    ReplayCase(tuple(FieldSpec(f"table_{k}", table=True) for k in range(12)), 5, 33, ((5, 33), (2, 8))),
]


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_copies(case: ReplayCase, device: str) -> None:
    ReplayRig(case, device).check()


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(st.data())
def test_random_cases(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    ReplayRig(random_replay_case(draw, runs=2), "cpu").check()


def test_the_arguments_are_the_seeds() -> None:
    expected = [f"src_{n}" for n in SIX] + [f"dst_{n}" for n in SIX] + ["batch_size", "max_seqlen_k"]
    assert list(inspect.signature(sgl_kernel.fused_copy_replay_data).parameters) == expected


def test_a_wide_table_needs_64_bit_offsets(device: str) -> None:
    """The last row begins beyond 2^31 elements of its table."""
    rows, width = 2049, 1 << 20
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GiB of GPU memory")
    from arena import huge_table

    with huge_table(rows, width, device) as table:
        plan = sgl_kernel.ReplayCopyPlan([sgl_kernel.ReplayField("page_table", table)])
        source = torch.arange(rows * 3, dtype=torch.int32, device=device).view(rows, 3)
        plan.run([source], rows, 3)
        assert torch.equal(table[[0, 1, 2047, 2048], :4].cpu()[:, :3], source[[0, 1, 2047, 2048]].cpu())


# ---- what is refused

MOST_BS, MOST_WIDTH, BS, WIDTH = 4, 8, 3, 6


def good(device: str) -> dict[str, object]:
    """The arguments of a good call, by name."""

    def tensor(name: str, bs: int, width: int, fill: int) -> torch.Tensor:
        shape = (bs, width) if name == "page_table" else (bs + int(name == "cu_seqlens_k"),)
        return torch.full(shape, fill, dtype=torch.int32, device=device)

    sources = {f"src_{name}": tensor(name, BS, WIDTH, 1) for name in SIX}
    destinations = {f"dst_{name}": tensor(name, MOST_BS, MOST_WIDTH, POISON) for name in SIX}
    return {**sources, **destinations, "batch_size": BS, "max_seqlen_k": WIDTH}


@dataclass(frozen=True)
class Wrong:
    name: str
    changes: Callable[[dict[str, object]], dict[str, object]]
    message: str


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, with gaps between neighbours."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


# fmt: off
WRONG = [
    Wrong("bs below 0", lambda a: {"batch_size": -1}, "batch_size: expected 0 .. 2147483647, found -1"),
    Wrong("bs above the captured size", lambda a: {"batch_size": 5},
          "dst_input_ids: expected a shape of at least [5], found [4]"),
    Wrong("bs above what one field holds", lambda a: {"dst_positions": a["dst_positions"][:2]},
          "dst_positions: expected a shape of at least [3], found [2]"),
    Wrong("no room for the prefix sum", lambda a: {"dst_cu_seqlens_k": a["dst_cu_seqlens_k"][:3]},
          "dst_cu_seqlens_k: expected a shape of at least [4], found [3]"),
    Wrong("bs above the sources", lambda a: {"batch_size": 4},
          "src_input_ids: expected a shape of at least [4], found [3]"),
    Wrong("bs of 2^40", lambda a: {"batch_size": 1 << 40}, "batch_size: expected 0 .. 2147483647"),
    Wrong("short source of the prefix sum", lambda a: {"src_cu_seqlens_k": a["src_cu_seqlens_k"][:3]},
          "src_cu_seqlens_k: expected a shape of at least [4], found [3]"),
    Wrong("width below 0", lambda a: {"max_seqlen_k": -1},
          "max_seqlen_k: expected 0 .. 2147483647, found -1"),
    Wrong("width above the table", lambda a: {"max_seqlen_k": 9},
          "dst_page_table: expected a shape of at least [3, 9], found [4, 8]"),
    Wrong("width above the source", lambda a: {"max_seqlen_k": 7},
          "src_page_table: expected a shape of at least [3, 7], found [3, 6]"),
    Wrong("int64 source", lambda a: {"src_out_loc": a["src_out_loc"].long()},
          "src_out_loc: expected int32, found int64"),
    Wrong("float destination", lambda a: {"dst_seq_lens": a["dst_seq_lens"].float()},
          "dst_seq_lens: expected int32, found float32"),
    Wrong("strided source", lambda a: {"src_positions": spread(a["src_positions"])},
          "src_positions: expected an inner stride of 1, found 2"),
    Wrong("strided destination", lambda a: {"dst_input_ids": spread(a["dst_input_ids"])},
          "dst_input_ids: expected an inner stride of 1, found 2"),
    Wrong("transposed source table", lambda a: {"src_page_table": a["src_page_table"].repeat(2, 1).t()[:3]},
          "src_page_table: expected an inner stride of 1, found 6"),
    Wrong("one row for all", lambda a: {"dst_page_table": a["dst_page_table"][:1].expand(4, 8)},
          "dst_page_table: expected rows that do not overlap"),
    Wrong("flat source table", lambda a: {"src_page_table": a["src_page_table"].flatten()},
          "src_page_table: expected rank 2, found 1"),
    Wrong("a table for a vector", lambda a: {"src_seq_lens": a["src_seq_lens"][None]},
          "src_seq_lens: expected rank 1, found 2"),
    Wrong("a source that is a destination", lambda a: {"src_out_loc": a["dst_positions"]},
          "dst_positions: expected memory apart from every source, found an overlap with src_out_loc"),
    Wrong("two destinations in one place", lambda a: {"dst_out_loc": a["dst_positions"]},
          "expected memory apart from"),
]
# fmt: on


@pytest.mark.parametrize("kind", ["call", "plan", "bound"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: w.name)
def test_what_is_refused(wrong: Wrong, kind: str, device: str) -> None:
    arguments = good(device)
    arguments |= wrong.changes(arguments)
    operator = "fused_copy_replay_data" if kind == "call" else "replay_copy"
    message = wrong.message if kind == "call" else wrong.message.replace("max_seqlen_k", "width")

    def make() -> None:
        if kind == "call":
            sgl_kernel.fused_copy_replay_data(**arguments)
            return
        fields = [
            sgl_kernel.ReplayField(name, arguments[f"dst_{name}"], int(name == "cu_seqlens_k"))
            for name in SIX
        ]
        sources = [arguments[f"src_{name}"] for name in SIX]
        plan, sizes = sgl_kernel.ReplayCopyPlan(fields), (arguments["batch_size"], arguments["max_seqlen_k"])
        if kind == "plan":
            plan.run(sources, *sizes)
        else:
            sgl_kernel.bind_replay_copy(plan)(*sizes, *sources)

    with pytest.raises(RuntimeError, match=f"{operator}: .*{re.escape(message)}"):
        make()
    for name in SIX:
        destination = arguments[f"dst_{name}"]
        assert bool((destination == POISON).all()), f"{name} was written"


FIELD_ERRORS = [
    ([], "fields: expected at least one, found 0"),
    ([("a", (4,), 0)] * 13, "fields: expected 1 .. 12, found 13"),
    ([("a", (4,), 5)], "dst_a: expected an extra of 0, or of at most its elements where it is 1-D, found 5"),
    ([("a", (4, 4), 1)], "dst_a: expected an extra of 0"),
    ([("a", (4,), -1)], "dst_a: expected an extra of 0"),
    ([("a%n", (4,), 0)], "names: expected names of 1 .. 31 letters, digits and underscores, found 'a%n'"),
    ([("", (4,), 0)], "names: expected names of"),
    ([("a" * 32, (4,), 0)], "names: expected names of"),
    ([("a,b", (4,), 0)], "fields: expected lists of one length"),
    ([("a", (2, 2, 2), 0)], "dst_a: expected rank 1, found 3"),
]


@pytest.mark.parametrize(("fields", "message"), FIELD_ERRORS, ids=[m[:40] for _, m in FIELD_ERRORS])
def test_what_a_plan_refuses(fields: list, message: str, device: str) -> None:
    made = [
        sgl_kernel.ReplayField(name, torch.zeros(shape, dtype=torch.int32, device=device), extra)
        for name, shape, extra in fields
    ]
    with pytest.raises(RuntimeError, match=re.escape(f"replay_copy: {message}")):
        sgl_kernel.ReplayCopyPlan(made)


def test_a_number_of_sources_that_is_not_the_plans(device: str) -> None:
    rig = ReplayRig(CASES[1], device)
    sources = rig.sources(0)
    with pytest.raises(RuntimeError, match=r"replay_copy_run_6.*missing value for argument 'src_5'"):
        rig.plan.run(sources[:5], 8, 64)
    with pytest.raises(RuntimeError, match=r"replay_copy_run_6.*expected at most 9 argument"):
        rig.plan.run([*sources, sources[0]], 8, 64)
    for count in (0, 5, 7, 12):
        with pytest.raises(RuntimeError, match=f"replay_copy: srcs: expected 6 tensors, found {count}"):
            rig.bound(8, 64, *(sources * 2)[:count])
    for arguments in ((), (8,), (8, 64, *sources * 3)):
        with pytest.raises(RuntimeError, match="expected batch_size, width and up to 12 sources"):
            rig.bound(*arguments)


def test_a_source_that_is_no_tensor() -> None:
    rig = ReplayRig(CASES[1], "cpu")
    with pytest.raises(RuntimeError, match="list"):
        rig.bound(8, 64, *rig.sources(0)[:5], [1, 2])
    with pytest.raises(TypeError, match="integer"):
        rig.bound("8", 64, *rig.sources(0))


def test_a_torch_without_the_exchange_api_is_served_by_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    ReplayRig(CASES[1], "cpu").check()


def test_a_replay_keeps_its_destinations_alive() -> None:
    source, destination = torch.arange(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    replay = sgl_kernel.bind_replay_copy(
        sgl_kernel.ReplayCopyPlan([sgl_kernel.ReplayField("a", destination)])
    )
    kept = destination.untyped_storage().data_ptr()
    del destination
    replay(4, 0, source)
    assert torch.zeros(4, dtype=torch.int32).untyped_storage().data_ptr() != kept


@pytest.mark.gpu
def test_a_source_on_another_device_is_refused(cuda: str) -> None:
    arguments = good(cuda)
    arguments["src_out_loc"] = arguments["src_out_loc"].cpu()
    with pytest.raises(RuntimeError, match="src_out_loc: expected a tensor on cuda:0, found cpu"):
        sgl_kernel.fused_copy_replay_data(**arguments)


@pytest.mark.gpu
def test_the_copy_runs_on_the_current_stream(cuda: str) -> None:
    """As copy_ does: after what the stream did to the sources, before what it does to the destinations."""
    rig = ReplayRig(CASES[2], cuda)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        rig.buffer.copy_(rig.fresh)
        rig.plan.run(rig.sources(0), *rig.case.runs[0])
        found = rig.buffer.clone()
    stream.synchronize()
    assert torch.equal(found.cpu(), rig.expected(0))
