"""What a replay calls equals the plans' own runs, in any combination."""

from __future__ import annotations

import pytest
import sgl_kernel
import torch

BS, WIDTH, BACKENDS = 3, 80, 5
POISON = -77


class Rig:
    """One staging set and five backends of DECODE, each a cache_seqlens and a page table."""

    def __init__(self, device: str = "cpu") -> None:
        def full(*size: int) -> torch.Tensor:
            return torch.full(size, POISON, dtype=torch.int32, device=device)

        self.seq_lens = torch.tensor([5, 70, 1], dtype=torch.int32, device=device)
        self.staging = sgl_kernel.MetadataDestination(cache_seqlens=full(BS), page_table_1=full(BS, WIDTH))
        self.backends = [(full(BS), full(BS, WIDTH)) for _ in range(BACKENDS)]
        self.req_to_token = torch.arange(4 * WIDTH, dtype=torch.int32, device=device).view(4, WIDTH)
        self.generate = sgl_kernel.NSAMetadataGeneratePlan(
            mode=0,
            bs=BS,
            seq_lens=self.seq_lens,
            req_pool_indices=torch.tensor([2, 1, 3], dtype=torch.int32, device=device),
            req_to_token=self.req_to_token,
            destinations=[self.staging],
            page_size=64,
            topk=16,
        )
        lengths, tables = zip(*self.backends)
        self.copy = sgl_kernel.FusedMetadataCopyPlan(
            [
                sgl_kernel.CopyRegion(src=self.staging.cache_seqlens, dsts=lengths),
                sgl_kernel.CopyRegion(src=self.staging.page_table_1, dsts=tables, cols_per=1),
            ]
        )

    def poison(self) -> None:
        sets = [(self.staging.cache_seqlens, self.staging.page_table_1), *self.backends]
        for tensor in [t for pair in sets for t in pair]:
            tensor.fill_(POISON)

    def contents(self) -> list[torch.Tensor]:
        sets = [(self.staging.cache_seqlens, self.staging.page_table_1), *self.backends]
        return [t.clone() for pair in sets for t in pair]


def runs(rig: Rig) -> dict[str, tuple]:
    """Name -> (what the plans do, what a replay calls)."""

    def both(max_len: int) -> None:
        rig.generate.run()
        rig.copy.run(max_len=max_len)

    return {
        "generate": (lambda max_len: rig.generate.run(), sgl_kernel.bind_generate(rig.generate)),
        "copy": (lambda max_len: rig.copy.run(max_len=max_len), sgl_kernel.bind_copy(rig.copy)),
        "both": (both, sgl_kernel.bind_generate_and_copy(rig.generate, rig.copy)),
    }


@pytest.mark.parametrize("max_len", [-1, 0, 70, WIDTH])
@pytest.mark.parametrize("name", ["generate", "copy", "both"])
def test_a_bound_replay_does_what_the_plans_do(name: str, max_len: int, device: str) -> None:
    rig = Rig(device)
    results = []
    for run in runs(rig)[name]:
        rig.poison()
        run(max_len)
        results.append(rig.contents())
    assert all(map(torch.equal, *results))
    if name == "both" and max_len == 70:
        for lengths, table in rig.backends:
            assert torch.equal(lengths, rig.seq_lens)
            for row, (request, length) in enumerate(zip((2, 1, 3), rig.seq_lens.tolist())):
                assert torch.equal(table[row, :length], rig.req_to_token[request, :length])


def test_a_replay_keeps_its_plans_alive(device: str) -> None:
    rig = Rig(device)
    expected, replay = rig.generate, sgl_kernel.bind_generate_and_copy(rig.generate, rig.copy)
    expected.run()
    backends = rig.backends
    rig.generate = rig.copy = rig.staging = expected = None
    replay(70)
    for lengths, _ in backends:
        assert torch.equal(lengths, rig.seq_lens)


def test_a_bound_beyond_the_tables_is_refused() -> None:
    rig = Rig()
    for name, max_len in (
        ("copy", WIDTH + 1),
        ("both", WIDTH + 1),
        ("copy", -2),
        ("generate", -2),
        ("both", -2),
    ):
        with pytest.raises(RuntimeError, match="max_len"):
            runs(rig)[name][1](max_len)


def test_nothing_is_generated_where_the_copy_is_refused() -> None:
    """The generation was enqueued before the copy's arguments were looked at."""
    rig = Rig()
    rig.poison()
    poisoned = rig.contents()
    with pytest.raises(RuntimeError, match="max_len"):
        runs(rig)["both"][1](WIDTH + 1)
    assert all(map(torch.equal, rig.contents(), poisoned))


def test_plans_in_each_others_place_are_refused() -> None:
    rig = Rig()
    for generate, copy in ((rig.copy, rig.generate), (rig.generate, rig.generate), (rig.copy, rig.copy)):
        with pytest.raises(RuntimeError, match="plan: expected a plan made by this operator"):
            sgl_kernel.bind_generate_and_copy(generate, copy)(-1)


@pytest.mark.parametrize(("max_len", "error"), [("70", TypeError), (7.0, TypeError), (2**70, OverflowError)])
def test_a_bound_that_is_no_number_is_refused(max_len: object, error: type[Exception]) -> None:
    rig = Rig()
    rig.poison()
    poisoned = rig.contents()
    with pytest.raises(error):
        sgl_kernel.bind_generate(rig.generate)(max_len)
    assert all(map(torch.equal, rig.contents(), poisoned))
