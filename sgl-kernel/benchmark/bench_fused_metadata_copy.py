"""Speed of the fused metadata kernels beside torch's copies: correctness first, one line per case, JSON last.

    python sgl-kernel/benchmark/bench_fused_metadata_copy.py --json result.json

Times are medians in microseconds. enqueue: the call alone, on an idle device. completion: synchronize, call,
synchronize. gpu: time of one node when a CUDA graph runs it many times in a row. All floors come from the
same run: one small copy_ on the host, 2 us or the bytes at the measured copy bandwidth on the GPU. The limits
are for an H200; with --device cpu there are none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "python")]

import sgl_kernel  # noqa: E402
import torch  # noqa: E402
from buffer_sets import CopySets, GenerateSets, Run  # noqa: E402

DESTINATIONS = (1, 3, 7, 15)
GRAPH_NODES = 50
HOST_FACTOR, GPU_FACTOR, GPU_FLOOR_US, NODE_LIMIT_US, SGLANG_FACTOR = 1.3, 1.5, 2.0, 3.0, 4.0


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
    megabytes: float
    limits: list[Limit]

    def line(self) -> str:
        times = f"{self.enqueue_us:9.2f}{self.completion_us:12.2f}{self.gpu_us:9.2f}"
        measured = f"{self.name:<44}{times}{self.megabytes:9.2f}"
        return "  ".join([measured, *map(str, self.limits)])


HEADER = f"{'case':<44}{'enqueue':>9}{'completion':>12}{'gpu':>9}{'MB':>9}"


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

    def gpu(self, run: Run, nodes: int = GRAPH_NODES) -> float:
        if not self.on_gpu:
            return self.host(run)[0][1]
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(nodes):
                run()
        times = []
        for repeat in range(23):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 3:
                times.append(begin.elapsed_time(end) * 1e3 / nodes)
        return statistics.median(times)


@dataclass(frozen=True)
class Floors:
    copy_enqueue_us: float  # one copy_ of 64 int32
    copy_completion_us: float
    copy_node_us: float  # the same as a node of a graph
    kernel_node_us: float  # the plan's kernel on one element, as a node of a graph
    bandwidth_gb_s: float  # device-to-device copy, bytes read and written

    def gpu_us(self, bytes_moved: int) -> float:
        return max(GPU_FLOOR_US, bytes_moved / self.bandwidth_gb_s * 1e-3)


def measure_floors(clock: Clock, device: str, bandwidth_bytes: int) -> Floors:
    small = [torch.zeros(64, dtype=torch.int32, device=device) for _ in range(2)]
    copy = lambda: small[0].copy_(small[1])  # noqa: E731
    one = sgl_kernel.FusedMetadataCopyPlan([sgl_kernel.CopyRegion(small[0][:1], (small[1][:1],))])
    large = [torch.zeros(bandwidth_bytes // 4, dtype=torch.int32, device=device) for _ in range(2)]
    large_us = clock.gpu(lambda: large[0].copy_(large[1]), nodes=5)
    enqueue, completion = clock.host(copy)[0]
    return Floors(
        enqueue, completion, clock.gpu(copy), clock.gpu(one.run), 2 * bandwidth_bytes / large_us * 1e-3
    )


def plan_case(name: str, run: Run, bytes_moved: int, clock: Clock, floors: Floors, copy: Run) -> Case:
    (copy_enqueue, _), (enqueue, completion) = clock.host(copy, run)
    gpu = clock.gpu(run)
    limits = [
        Limit("enqueue/copy_", enqueue / copy_enqueue, HOST_FACTOR),
        Limit("gpu", gpu, GPU_FACTOR * floors.gpu_us(bytes_moved)),
    ]
    return Case(name, enqueue, completion, gpu, bytes_moved / 1e6, limits)


def torch_case(name: str, run: Run, times: tuple[float, float], clock: Clock, sets: CopySets) -> Case:
    nodes = max(2, GRAPH_NODES // len(sets.flat_dsts))
    return Case(f"  {name}", *times, clock.gpu(run, nodes), sets.bytes_moved / 1e6, [])


def bench_copy(clock: Clock, floors: Floors, device: str, bs: int, cols: int, copy: Run) -> list[Case]:
    cases = []
    for n in DESTINATIONS:
        sets = CopySets(device, bs, cols, n)
        sets.check(sets.run_plan, "fused_metadata_copy")
        shape = f"N={n} bs={bs} cols={cols}"
        cases.append(plan_case(f"copy plan {shape}", sets.run_plan, sets.bytes_moved, clock, floors, copy))
        copies, foreach = clock.host(sets.run_copies, sets.run_foreach)
        cases.append(torch_case(f"{len(sets.flat_dsts)} copy_", sets.run_copies, copies, clock, sets))
        cases.append(torch_case("_foreach_copy_", sets.run_foreach, foreach, clock, sets))
    return cases


def bench_generate(clock: Clock, floors: Floors, device: str, bs: int, cols: int, copy: Run) -> list[Case]:
    cases = []
    for n in DESTINATIONS:
        sets = GenerateSets(device, bs, cols, n)
        sets.check()
        name = f"generate plan N={n} bs={bs} cols={cols}"
        cases.append(plan_case(name, sets.plan.run, sets.bytes_moved, clock, floors, copy))
    for size in (1, 2, 4, 8, 16, 32):
        sets = GenerateSets(device, size, cols, 1)
        sets.check()
        enqueue, completion = clock.host(sets.plan.run)[0]
        gpu = clock.gpu(sets.plan.run)
        name = f"generate node N=1 bs={size} cols={cols}"
        limit = Limit("gpu", gpu, NODE_LIMIT_US)
        cases.append(Case(name, enqueue, completion, gpu, sets.bytes_moved / 1e6, [limit]))
    return cases


def bench_sglang(clock: Clock, device: str, bs: int, cols: int) -> list[Case]:
    cases = []
    for n, make in ((1, CopySets.sglang_single), (3, CopySets.sglang_multi)):
        sets = CopySets(device, bs, cols, n)
        fused = make(sets)
        sets.check(fused, "SGLang's call")
        mine, copies, foreach = clock.host(fused, sets.run_copies, sets.run_foreach)
        limits = []
        if n == 3:
            for what, index in (("enqueue", 0), ("completion", 1)):
                limits.append(Limit(f"copy_ {what} x", copies[index] / mine[index], SGLANG_FACTOR, True))
                limits.append(Limit(f"foreach {what} x", foreach[index] / mine[index], 1.0, True))
        name = f"SGLang's {'multi' if n == 3 else 'single'} call N={n} bs={bs} cols={cols}"
        cases.append(Case(name, *mine, clock.gpu(fused), sets.bytes_moved / 1e6, limits))
        cases.append(torch_case(f"{len(sets.flat_dsts)} copy_", sets.run_copies, copies, clock, sets))
        cases.append(torch_case("_foreach_copy_", sets.run_foreach, foreach, clock, sets))
    return cases


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
    floors = measure_floors(clock, args.device, (1 << 30) if clock.on_gpu else (1 << 26))
    name = torch.cuda.get_device_name() if clock.on_gpu else "cpu"
    print(f"{name}, torch {torch.__version__}; medians of {args.repeats} calls, microseconds")
    print("floors: " + ", ".join(f"{key} {value:.2f}" for key, value in asdict(floors).items()))
    print(HEADER)

    small = [torch.zeros(64, dtype=torch.int32, device=args.device) for _ in range(2)]
    copy = lambda: small[0].copy_(small[1])  # noqa: E731
    shape = (args.device, args.bs, args.cols)
    cases: list[Case] = []
    for bench in (
        lambda: bench_copy(clock, floors, *shape, copy),
        lambda: bench_generate(clock, floors, *shape, copy),
        lambda: bench_sglang(clock, *shape),
    ):
        for case in bench():
            if not clock.on_gpu:
                case.limits = []
            print(case.line())
            cases.append(case)

    limits = [limit for case in cases for limit in case.limits]
    held = sum(limit.held for limit in limits)
    print(f"{held} of {len(limits)} limits held")
    result = {
        "device": name,
        "torch": torch.__version__,
        "floors": asdict(floors),
        "limits_held": held,
        "limits": len(limits),
        "cases": [
            {**asdict(case), "limits": [{**asdict(limit), "held": limit.held} for limit in case.limits]}
            for case in cases
        ],
    }
    text = json.dumps(result, indent=1)
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
