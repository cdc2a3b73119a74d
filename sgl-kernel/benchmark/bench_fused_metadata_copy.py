"""Speed of the fused metadata kernels beside torch's copies: correctness first, one line per case, JSON last.

    python sgl-kernel/benchmark/bench_fused_metadata_copy.py --json result.json

Times are medians in microseconds. enqueue: the call alone, on an idle device. completion: synchronize, call,
synchronize. gpu: time of one node when a CUDA graph runs it many times in a row, each time on other buffers,
which together are far above the GPU's cache (L2). hot: the same on the same buffers.

floor: the larger of one launch (the copy kernel on one element, as a node) and the bytes, each source counted
once, at the bandwidth that a copy far above the cache reaches in the same run; ratio: gpu / floor. The limits
are for an H200; with --device cpu there are none.

Requests hold whole pages of slots. A generation is told so, as servers do, and reads one sector of each page;
"by column" it is not, and reads every slot. The limits of large tables are of the floor by column in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "python")]

import sgl_kernel  # noqa: E402
import torch  # noqa: E402
from buffer_sets import CopySets, GenerateSets, MemcpySets, ReplicateSets, Run  # noqa: E402

DESTINATIONS = (1, 3, 7, 15)
LARGE = (128, 131072)  # requests, columns: only bytes count
GRAPH_NODES = 50
MOST_SETS = 512
HOST_FACTOR, SGLANG_FACTOR = 1.3, 4.0
GPU_FACTOR, NODE_LIMIT_US, VECTORS_LIMIT_US = 1.5, 3.0, 4.0
LARGE_FACTOR, LARGE_REPLICATE_FACTOR = 1.10, 1.15
READS = {True: "", False: " by column"}  # whether a plan is told of whole pages
TABLES = {"run": "shared tables", "run_in_graph": "in graph"}  # what the host knows of the lengths


@dataclass
class Limit:
    what: str
    value: float  # us, or a factor
    limit: float
    at_least: bool = False

    @property
    def held(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.what} {self.value:7.2f} {sign} {self.limit:6.2f} {'PASS' if self.held else 'MISS'}"


@dataclass
class Case:
    name: str
    enqueue_us: float
    completion_us: float
    gpu_us: float
    hot_us: float
    megabytes: float
    floor_us: float
    limits: list[Limit] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.gpu_us / self.floor_us

    def line(self) -> str:
        times = f"{self.enqueue_us:9.2f}{self.completion_us:12.2f}{self.gpu_us:9.2f}{self.hot_us:9.2f}"
        measured = f"{self.name:<44}{times}{self.megabytes:9.2f}{self.floor_us:9.2f}{self.ratio:7.2f}"
        return "  ".join([measured, *map(str, self.limits)])


HEADER = f"{'case':<44}{'enqueue':>9}{'completion':>12}{'gpu':>9}{'hot':>9}{'MB':>9}{'floor':>9}{'ratio':>7}"


class Clock:
    """Times calls on one device; on the CPU a call is complete when it returns, so all times are one."""

    def __init__(self, device: str, repeats: int) -> None:
        self.on_gpu, self.repeats = device == "cuda", repeats

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def host(self, *runs: Run) -> list[tuple[float, float]]:
        """(enqueue, completion) of each, in turns, so that all meet the same state of the machine."""
        samples: list[list[tuple[float, float]]] = [[] for _ in runs]
        for repeat in range(self.repeats + 10):
            for run, mine in zip(runs, samples, strict=True):
                self.synchronize()
                start = time.perf_counter()
                run()
                enqueued = time.perf_counter()
                self.synchronize()
                if repeat >= 10:
                    mine.append(((enqueued - start) * 1e6, (time.perf_counter() - start) * 1e6))
        return [tuple(statistics.median(column) for column in zip(*mine, strict=True)) for mine in samples]

    def gpu(self, runs: Sequence[Run], nodes: int = GRAPH_NODES) -> float:
        """Per call, when all `runs` follow each other, as often as it takes to be at least `nodes`."""
        if not self.on_gpu:
            return self.host(runs[0])[0][1]
        rounds = -(-nodes // len(runs))
        for run in runs:
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for run in runs:
                    run()
        return self.events(graph.replay) / (rounds * len(runs))

    def events(self, run: Run) -> float:
        times = []
        for repeat in range(23):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            if repeat >= 3:
                times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times)


@dataclass(frozen=True)
class Floors:
    copy_enqueue_us: float  # one copy_ of 64 int32
    copy_completion_us: float
    copy_node_us: float  # the same as a node of a graph
    kernel_node_us: float  # the plan's kernel on one element, as a node of a graph
    bandwidth_gb_s: float  # of a copy far above the cache, bytes read and written
    cache_bytes: int

    def gpu_us(self, bytes_moved: int) -> float:
        return max(self.kernel_node_us, bytes_moved / self.bandwidth_gb_s * 1e-3)


def measure_floors(clock: Clock, device: str) -> Floors:
    small = [torch.zeros(64, dtype=torch.int32, device=device) for _ in range(2)]
    copy = lambda: small[0].copy_(small[1])  # noqa: E731
    one = sgl_kernel.FusedMetadataCopyPlan([sgl_kernel.CopyRegion(small[0][:1], (small[1][:1],))])
    enqueue, completion = clock.host(copy)[0]
    cache = torch.cuda.get_device_properties(device).L2_cache_size if clock.on_gpu else 0
    nodes = clock.gpu([copy]), clock.gpu([one.run])
    return Floors(enqueue, completion, *nodes, measure_bandwidth(clock, device), cache)


def measure_bandwidth(clock: Clock, device: str) -> float:
    """GB/s of the fastest of three kernels that copy. Not as nodes of a graph: a copy node is slower."""
    size = (1 << 31) if clock.on_gpu else (1 << 24)  # bytes of each buffer
    src, dst = (torch.zeros(size // 4, dtype=torch.int32, device=device) for _ in range(2))
    plan = sgl_kernel.FusedMetadataCopyPlan([sgl_kernel.CopyRegion(src, (dst,))])
    runs = (lambda: dst.copy_(src), lambda: torch.bitwise_not(src, out=dst), plan.run)
    times = [clock.events(run) for run in runs] if clock.on_gpu else [t for _, t in clock.host(*runs)]
    return 2 * size / min(times) * 1e-3


class Bench:
    """Measures cases over rotated buffers and collects them."""

    def __init__(self, clock: Clock, floors: Floors, device: str) -> None:
        self.clock, self.floors, self.device, self.cases = clock, floors, device, []
        small = [torch.zeros(64, dtype=torch.int32, device=device) for _ in range(2)]
        self.small_copy: Run = lambda: small[0].copy_(small[1])

    def rotation(self, make: Callable[[], object]) -> list:
        """Sets of buffers that together are four times the cache, but 2 at least and at most MOST_SETS."""
        first = make()
        count = max(2, -(-4 * self.floors.cache_bytes // first.bytes_moved)) if self.clock.on_gpu else 1
        return [first, *(make() for _ in range(min(count, MOST_SETS) - 1))]

    def add(
        self, name: str, sets: list, method: str = "run", host: tuple[float, float] | None = None
    ) -> Case:
        runs = [getattr(s, method) for s in sets]
        size = sets[0].bytes_moved
        nodes = max(4, min(GRAPH_NODES, int(4e9 / size), GRAPH_NODES * 8 // launches_of(sets[0], method)))
        enqueue, completion = host or self.clock.host(runs[0])[0]
        gpu, hot = self.clock.gpu(runs, nodes), self.clock.gpu(runs[:1], nodes)
        case = Case(name, enqueue, completion, gpu, hot, size / 1e6, self.floors.gpu_us(size))
        self.cases.append(case)
        return case

    def add_plan(self, name: str, sets: list) -> Case:
        """One launch: as cheap for the host as one `copy_`, and near its floor on the GPU."""
        (copy_enqueue, _), host = self.clock.host(self.small_copy, sets[0].run)
        case = self.add(name, sets, host=host)
        case.limits = [
            Limit("enqueue/copy_", case.enqueue_us / copy_enqueue, HOST_FACTOR),
            Limit("gpu", case.gpu_us, max(NODE_LIMIT_US, GPU_FACTOR * case.floor_us)),
        ]
        return case

    def copies(self, bs: int, cols: int) -> None:
        for n in DESTINATIONS:
            sets = self.rotation(partial(CopySets, self.device, bs, cols, n))
            sets[0].check(sets[0].run, "fused_metadata_copy")
            self.add_plan(f"copy plan N={n} bs={bs} cols={cols}", sets)
            self.competitors(sets)

    def competitors(self, sets: list[CopySets]) -> list[tuple[float, float]]:
        hosts = self.clock.host(sets[0].run_copies, sets[0].run_foreach)
        names = f"  {len(sets[0].flat_dsts)} copy_", "  _foreach_copy_"
        for name, method, host in zip(names, ("run_copies", "run_foreach"), hosts, strict=True):
            self.add(name, sets, method, host)
        return hosts

    def generations(self, bs: int, cols: int) -> None:
        for n in DESTINATIONS:
            sets = self.rotation(partial(GenerateSets, self.device, bs, cols, n))
            sets[0].check()
            self.add_plan(f"generate plan N={n} bs={bs} cols={cols}", sets)
        for size, (whole_pages, how) in product((1, 2, 4, 8, 16, 32), READS.items()):
            make = partial(GenerateSets, self.device, size, cols, 7, "shared", whole_pages=whole_pages)
            sets = self.rotation(make)
            for method in ("run", "run_in_graph"):
                sets[0].check(method)
                case = self.add(f"{TABLES[method]}{how} N=7 bs={size} cols={cols}", sets, method)
                case.limits = [Limit("hot", case.hot_us, NODE_LIMIT_US)]

    def vectors(self, bs: int, all_cols: Sequence[int]) -> None:
        for cols in all_cols:
            sets = [GenerateSets(self.device, bs, cols, 7, "none") for _ in range(4)]
            sets[0].check()
            case = self.add(f"vectors alone N=7 bs={bs} cols={cols}", sets)
            case.limits = [Limit("gpu", case.gpu_us, VECTORS_LIMIT_US)]

    def large(self, bs: int, cols: int) -> None:
        """Where bytes are all that counts."""
        shape = self.device, bs, cols, 7
        kinds = (
            (TABLES, LARGE_FACTOR, partial(GenerateSets, *shape, "shared")),
            ({"run": "generate plan"}, GPU_FACTOR, partial(GenerateSets, *shape)),
            ({"run": "generate, then copy"}, LARGE_REPLICATE_FACTOR, partial(ReplicateSets, *shape)),
        )
        for (names, factor, make), (whole_pages, how) in product(kinds, READS.items()):
            sets = self.rotation(partial(make, whole_pages=whole_pages))
            floor = self.floors.gpu_us(sets[0].bytes_by_column)
            for method, name in names.items():
                sets[0].check(method)
                case = self.add(f"{name}{how} N=7 bs={bs} cols={cols}", sets, method)
                case.limits = [Limit("gpu/floor by column", case.gpu_us / floor, factor)]
            memcpy = partial(MemcpySets, self.device, sets[0].bytes_moved)
            del sets
            self.add("  memcpy node of the same bytes", self.rotation(memcpy))

    def sglang(self, bs: int, cols: int) -> None:
        for n, kind in ((1, "single"), (3, "multi")):
            sets = self.rotation(partial(CopySets, self.device, bs, cols, n))
            method = f"run_{kind}"
            fused = getattr(sets[0], method)
            sets[0].check(fused, "SGLang's call")
            mine, copies, foreach = self.clock.host(fused, sets[0].run_copies, sets[0].run_foreach)
            case = self.add(f"SGLang's {kind} call N={n} bs={bs} cols={cols}", sets, method, mine)
            if n == 3:
                for what, index in (("enqueue", 0), ("completion", 1)):
                    case.limits += [
                        Limit(f"copy_ {what} x", copies[index] / mine[index], SGLANG_FACTOR, True),
                        Limit(f"foreach {what} x", foreach[index] / mine[index], 1.0, True),
                    ]
            self.competitors(sets)


def launches_of(sets: object, method: str) -> int:
    return len(sets.flat_dsts) if method in ("run_copies", "run_foreach") else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--bs", type=int, default=32)
    parser.add_argument("--cols", type=int, default=16384, help="live columns")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    error = sgl_kernel.load_error(args.device)
    if error is not None:
        sys.exit(error)
    torch.set_num_threads(1)
    clock = Clock(args.device, args.repeats)
    floors = measure_floors(clock, args.device)
    name = torch.cuda.get_device_name() if clock.on_gpu else "cpu"
    print(f"{name}, torch {torch.__version__}; medians of {args.repeats} calls, microseconds")
    print("floors: " + ", ".join(f"{key} {value:.2f}" for key, value in asdict(floors).items()))
    print(HEADER)

    bench = Bench(clock, floors, args.device)
    parts = [
        lambda: bench.copies(args.bs, args.cols),
        lambda: bench.generations(args.bs, args.cols),
        lambda: bench.vectors(128, (1024, 131072) if clock.on_gpu else (1024,)),
        lambda: bench.sglang(args.bs, args.cols),
    ]
    if clock.on_gpu:
        parts.append(lambda: bench.large(*LARGE))
    printed = 0
    for part in parts:
        part()
        for case in bench.cases[printed:]:
            if not clock.on_gpu:
                case.limits = []
            print(case.line(), flush=True)
        printed = len(bench.cases)

    limits = [limit for case in bench.cases for limit in case.limits]
    held = sum(limit.held for limit in limits)
    print(f"{held} of {len(limits)} limits held")
    result = {
        "device": name,
        "torch": torch.__version__,
        "floors": asdict(floors),
        "limits_held": held,
        "limits": len(limits),
        "cases": [
            {
                **asdict(case),
                "ratio": case.ratio,
                "limits": [{**asdict(limit), "held": limit.held} for limit in case.limits],
            }
            for case in bench.cases
        ],
    }
    text = json.dumps(result, indent=1)
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
