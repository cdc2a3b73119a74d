"""A long simulated continuous batch in which every replay is verified.

Requests come, grow by what they accept, leave; their places in the pool are used again, batch sizes change,
some steps have nothing to do. The runtime's own step functions, backends and graph runner do the work.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from tqdm import tqdm

from sglang.srt.layers.attention.nsa.metadata import ALL_FIELDS, MetadataMode
from sglang.srt.layers.attention.nsa.paths import PATHS, MetadataSelection
from sglang.srt.layers.attention.nsa_backend import (
    NativeSparseAttnBackend,
    NativeSparseAttnMultiStepBackend,
    NSAConfig,
)
from sglang.srt.layers.attention.registry import SparseAttentionOps
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.graph_runner import StepInputs
from sglang.srt.model_executor.step_function import StepFunction, StepMetadata
from sglang.srt.model_executor.step_graph import StepGraph

DRAFT_TOKENS = 5  # D; N = D - 2 draft backends
BATCH_SIZES = (0, 1, 2, 4, 8, 12)
WIDTH, PAGE_SIZE = 512, 64
TOPK = 128


@dataclass
class SoakReport:
    """What a soak went through."""

    replays: int = 0
    steps: int = 0
    idle_steps: int = 0
    arrivals: int = 0
    departures: int = 0
    reused_slots: int = 0
    largest_length: int = 0
    batch_sizes: set[int] = field(default_factory=set)
    paths: list[str] = field(default_factory=list)
    fallbacks: int = 0

    def __str__(self) -> str:
        return (
            f"{self.replays} replays verified, no difference: paths {', '.join(self.paths)}; "
            f"{self.steps} steps, {self.idle_steps} idle; {self.arrivals} requests came, {self.departures} "
            f"left, {self.reused_slots} reused a slot; batch sizes {sorted(self.batch_sizes)}; "
            f"longest {self.largest_length}; fallbacks {self.fallbacks}"
        )


class Simulation:
    """The requests: what the scheduler and the sampler would have left in the pool's device tensors."""

    def __init__(self, pool: ReqToTokenPool, seed: int, report: SoakReport) -> None:
        self.pool, self.report = pool, report
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.running: dict[int, int] = {}  # index in the pool -> committed length
        self.used: set[int] = set()

    def change_batch(self) -> list[int]:
        """Some leave, some come; returns who runs in this step, in an order of its own."""
        rng, report = self.random, self.report
        for index, length in list(self.running.items()):
            if rng.random() < 0.05 or length + 2 * DRAFT_TOKENS > WIDTH:
                del self.running[index]
                self.pool.free(index)
                report.departures += 1
        if rng.random() < 0.01:  # everybody leaves
            for index in list(self.running):
                del self.running[index]
                self.pool.free(index)
                report.departures += 1
        wanted = rng.choice((0, 0, 1, 1, 2, 6)) if len(self.running) < BATCH_SIZES[-1] else 0
        for _ in range(min(wanted, BATCH_SIZES[-1] - len(self.running))):
            self._arrive()
        running = list(self.running)
        if rng.random() < 0.05:
            return []  # an idle step: the requests wait for something else
        rng.shuffle(running)
        return running

    def _arrive(self) -> None:
        index = self.pool.alloc()
        if index is None:
            return
        self.report.arrivals += 1
        self.report.reused_slots += index in self.used
        self.used.add(index)
        length = self.random.randint(1, self.random.choice((8, 70, WIDTH - 3 * DRAFT_TOKENS)))
        self._write_pages(index, 0, WIDTH)  # another request's slots are gone
        self._commit(index, length)

    def _write_pages(self, index: int, begin: int, end: int) -> None:
        """New pages where one begins in columns `begin` to `end`."""
        first, last = (-(-column // PAGE_SIZE) for column in (begin, end))
        pages = torch.randint(0, 1 << 18, (last - first, 1), generator=self.generator, dtype=torch.int32)
        slots = pages * PAGE_SIZE + torch.arange(PAGE_SIZE, dtype=torch.int32)
        self.pool.req_to_token[index, first * PAGE_SIZE : last * PAGE_SIZE].copy_(slots.flatten())

    def _commit(self, index: int, length: int) -> None:
        self.running[index] = length
        self.pool.seq_lens[index] = length
        self.report.largest_length = max(self.report.largest_length, length)

    def grow(self, index: int, accepted: int) -> None:
        length = self.running[index]
        self._commit(index, length + accepted)
        # The next step's drafts may begin a page.
        self._write_pages(index, length + accepted, min(length + accepted + DRAFT_TOKENS, WIDTH))


class Lane:
    """Draft, verification and extension over one selection of a path, with verification on."""

    def __init__(self, selection: MetadataSelection, pool: ReqToTokenPool, device: torch.device) -> None:
        ops = SparseAttentionOps("none", _no_attention, _no_attention, reads=ALL_FIELDS)
        config = NSAConfig(TOPK, PAGE_SIZE, WIDTH, device, selection, ops, ops)
        draft = NativeSparseAttnMultiStepBackend(config, DRAFT_TOKENS - 2)
        target, extend = NativeSparseAttnBackend(config), NativeSparseAttnBackend(config)
        self.step = StepInputs.create(BATCH_SIZES[-1], DRAFT_TOKENS, 1, torch.float32, device)
        functions = (
            StepFunction("draft", _body, draft, StepMetadata(MetadataMode.DECODE, 1, draft.offsets)),
            StepFunction(
                "verify", _body, target, StepMetadata(MetadataMode.TARGET_VERIFY, DRAFT_TOKENS, (0,))
            ),
            StepFunction(
                "extend", _body, extend, StepMetadata(MetadataMode.DRAFT_EXTEND, DRAFT_TOKENS, (0,))
            ),
        )
        views = {bs: self.step.view(bs) for bs in BATCH_SIZES}
        for function in functions:
            function.plan(self.step, pool, BATCH_SIZES)
        self.graphs = tuple(StepGraph(function.name, (function,), function) for function in functions)
        for graph in self.graphs:
            graph.capture(views, device)

    @property
    def fallbacks(self) -> int:
        functions = [function for graph in self.graphs for function in graph.functions]
        return sum(function.backend.graph_metadata.fallbacks for function in functions)


def _no_attention(*_args: object) -> torch.Tensor:
    raise AssertionError("the soak replays metadata, not attention")


def _body(step: StepInputs) -> torch.Tensor:
    return step.seq_lens + 1  # a captured graph may not be empty


def selections(device: torch.device) -> Iterator[MetadataSelection]:
    """Every path with both rules, by the fused kernels."""
    layouts = [(path, "fused") for path in PATHS if path != "recompute"] + [("replicate", "direct")]
    for (path, copy), rule in product(layouts, ("step", "committed")):
        yield MetadataSelection(True, path, copy, rule, check_replays=True)


def soak(count: int, device: torch.device, seed: int = 0, progress: bool = False) -> SoakReport:
    """At least `count` verified replays, an equal share of them on each path. Raises where one differs."""
    report = SoakReport()
    chosen = list(selections(device))
    share = -(-count // len(chosen))
    with tqdm(total=share * len(chosen), unit="replay", desc="soak", disable=not progress) as bar:
        for i, selection in enumerate(chosen):
            copy = f"/{selection.copy}" if selection.path == "replicate" else ""
            report.paths.append(f"{selection.path}{copy}/{selection.draft_seqlens}")
            _soak_path(selection, share, device, seed + i, report, bar)
    return report


@torch.inference_mode()
def _soak_path(
    selection: MetadataSelection, count: int, device: torch.device, seed: int, report: SoakReport, bar: tqdm
) -> None:
    pool = ReqToTokenPool(2 * BATCH_SIZES[-1], WIDTH, 1, device, page_size=PAGE_SIZE)
    simulation = Simulation(pool, seed, report)
    lane = Lane(selection, pool, device)
    done = 0
    while done < count:
        requests = simulation.change_batch()
        replays = _step(lane, simulation, requests)
        report.steps += 1
        report.idle_steps += not requests
        report.batch_sizes.add(len(requests))
        done += replays
        report.replays += replays
        bar.update(replays)
    report.fallbacks += lane.fallbacks


def _step(lane: Lane, simulation: Simulation, requests: list[int]) -> int:
    """One speculative step: three verified replays."""
    pool, rng = simulation.pool, simulation.random
    bs = lane.graphs[0].runner.padded(len(requests))
    step = lane.step.view(bs)
    step.set_requests(torch.tensor(requests, dtype=torch.int32, device=pool.seq_lens.device))
    step.load_lengths(pool)
    max_len = max((simulation.running[index] for index in requests), default=1) + DRAFT_TOKENS
    draft, verify, extend = lane.graphs
    draft.replay(bs, max_len)
    verify.replay(bs, max_len)
    accepted = [rng.randint(1, DRAFT_TOKENS) for _ in requests]
    step.accept_lens.copy_(torch.tensor(accepted + [0] * (bs - len(requests)), dtype=torch.int32))
    torch.add(step.seq_lens, step.accept_lens, out=step.extend_seq_lens)
    extend.replay(bs, max_len)
    for index, count in zip(requests, accepted):
        simulation.grow(index, count)
    return len(lane.graphs)
