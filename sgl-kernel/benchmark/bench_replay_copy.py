"""The copy of a decode batch into the static inputs of mini-sglang's graph: six `copy_`, `_foreach_copy_`,
one launch.

    python sgl-kernel/benchmark/bench_replay_copy.py --json result.json

Every step has sources of its own, as a scheduler makes them. Times are microseconds. enqueue: the call
alone, on an idle device, median. row: one of many calls in a row, synchronized before and after (host or
device, whichever is slower). gpu: one call as part of a CUDA graph. All methods take turns, so that they
meet the same state of the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "python")]

import sgl_kernel  # noqa: E402
import torch  # noqa: E402
from bench_fused_metadata_copy import Clock  # noqa: E402

ROW = 1000  # calls in a row
SIX_FACTOR, FOREACH_FACTOR = 4.0, 1.5  # how much less host time, on an H200


class ReplayInputs:
    """A batch's six tensors and the static buffers that they are copied into, as mini-sglang has them."""

    def __init__(self, device: str, bs: int, width: int, most_bs: int, most_width: int) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.bs, self.width = bs, width
        lengths = (bs, bs, bs + 1, bs, bs)
        self.sources = [torch.randint(0, 1 << 30, (n,), device=device, dtype=torch.int32) for n in lengths]
        self.sources.append(torch.randint(0, 1 << 30, (bs, width), device=device, dtype=torch.int32))
        vectors = [zeros(most_bs + extra) for extra in (0, 0, 1, 0, 0)]
        self.destinations = [*vectors, zeros(most_bs, most_width)]
        self.held = [buffer[:n] for buffer, n in zip(vectors, lengths, strict=True)]
        names = ("input_ids", "out_loc", "cu_seqlens_k", "positions", "seq_lens", "page_table")
        self.plan = sgl_kernel.ReplayCopyPlan(
            [
                sgl_kernel.ReplayField(name, buffer, extra=int(name == "cu_seqlens_k"))
                for name, buffer in zip(names, self.destinations, strict=True)
            ]
        )
        self.bound = sgl_kernel.bind_replay_copy(self.plan)

    def live(self) -> list[torch.Tensor]:
        return [*self.held, self.destinations[-1][: self.bs, : self.width]]

    def six_copies(self) -> None:
        bs = self.bs
        input_ids, out_loc, cu_seqlens_k, positions, seq_lens, page_table = self.destinations
        input_ids[:bs].copy_(self.sources[0])
        out_loc[:bs].copy_(self.sources[1])
        cu_seqlens_k[: bs + 1].copy_(self.sources[2])
        positions[:bs].copy_(self.sources[3])
        seq_lens[:bs].copy_(self.sources[4])
        page_table[:bs, : self.width].copy_(self.sources[5])

    def foreach(self) -> None:
        """The strongest form: all views that can be held are; the table's depends on the width."""
        torch._foreach_copy_([*self.held, self.destinations[-1][: self.bs, : self.width]], self.sources)

    def fused_call(self) -> None:
        sgl_kernel.fused_copy_replay_data(*self.sources, *self.destinations, self.bs, self.width)

    def fused_plan(self) -> None:
        self.bound(self.bs, self.width, *self.sources)

    def methods(self) -> dict[str, Callable[[], None]]:
        return {
            "six copy_": self.six_copies,
            "_foreach_copy_": self.foreach,
            "fused_copy_replay_data": self.fused_call,
            "ReplayCopyPlan": self.fused_plan,
        }

    def check(self, name: str) -> None:
        for destination in self.destinations:
            destination.fill_(-1)
        self.methods()[name]()
        for found, expected in zip(self.live(), self.sources, strict=True):
            assert torch.equal(found, expected), name
        beyond = self.destinations[-1].clone()
        beyond[: self.bs, : self.width] = -1
        assert bool((beyond == -1).all()), f"{name} wrote beyond the live part"


@dataclass
class Result:
    method: str
    bs: int
    width: int
    launches: int
    enqueue_us: float
    row_us: float
    gpu_us: float


def count_launches(run: Callable[[], None], on_gpu: bool) -> int:
    if not on_gpu:
        return 0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def time_row(clock: Clock, run: Callable[[], None], calls: int) -> float:
    clock.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    clock.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def measure(clock: Clock, inputs: ReplayInputs, calls: int) -> list[Result]:
    methods = inputs.methods()
    for name in methods:
        inputs.check(name)
    enqueue = [first for first, _ in clock.host(*methods.values())]
    rows = [[time_row(clock, run, calls) for run in methods.values()] for _ in range(5)]
    results = []
    for index, (name, run) in enumerate(methods.items()):
        row = sorted(times[index] for times in rows)[len(rows) // 2]
        launches = count_launches(run, clock.on_gpu)
        gpu = clock.gpu([run])
        results.append(Result(name, inputs.bs, inputs.width, launches, enqueue[index], row, gpu))
    return results


def print_results(results: list[Result]) -> None:
    original = results[0]
    for r in results:
        speedup = f"{original.enqueue_us / r.enqueue_us:6.2f}x{original.row_us / r.row_us:7.2f}x"
        times = f"{r.enqueue_us:9.2f}{r.row_us:9.2f}{r.gpu_us:9.2f}"
        print(f"{r.bs:>4}{r.width:>7}  {r.method:<24}{r.launches:>3}{times}  {speedup}", flush=True)


def held(results: list[Result]) -> tuple[bool, bool]:
    six, foreach, _, plan = (r.enqueue_us for r in results)
    return six / plan >= SIX_FACTOR, foreach / plan >= FOREACH_FACTOR


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--bs", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 8192], help="live columns")
    parser.add_argument("--most-width", type=int, default=40960, help="columns of the static page table")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--calls", type=int, default=ROW, help="calls in a row")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    error = sgl_kernel.load_error(args.device)
    if error is not None:
        sys.exit(error)
    torch.set_num_threads(1)
    clock = Clock(args.device, args.repeats)
    device = torch.cuda.get_device_name() if clock.on_gpu else "cpu"
    print(f"{device}, torch {torch.__version__}; microseconds; speed-ups of enqueue and row over six copy_")
    print(f"{'bs':>4}{'width':>7}  {'method':<24}{'n':>3}{'enqueue':>9}{'row':>9}{'gpu':>9}")
    every, kept = [], []
    for bs in args.bs:
        for width in args.width:
            inputs = ReplayInputs(args.device, bs, width, max(args.bs), max(args.most_width, *args.width))
            results = measure(clock, inputs, args.calls)
            print_results(results)
            every += results
            kept.append(held(results))
    if clock.on_gpu:
        six, foreach = (sum(column) for column in zip(*kept, strict=True))
        print(
            f"host time of the plan: {SIX_FACTOR}x less than six copy_ in {six} of {len(kept)} cases, "
            f"{FOREACH_FACTOR}x less than _foreach_copy_ in {foreach} of {len(kept)}"
        )
    if args.json is not None:
        record = {"device": device, "torch": torch.__version__, "results": [asdict(r) for r in every]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
