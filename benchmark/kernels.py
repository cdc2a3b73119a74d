"""Kernels of prefill and decode alone, ours and the libraries': sparse MLA, index scores and top-k, experts.

    python benchmark/kernels.py --device cuda --json kernels.json

Each is compared with the torch reference first. On CUDA a time is that of a replayed graph; of what takes
several kernels, the profiler's time of each. Beside it stands its floor: what its products take at the speed
of a plain matrix product on this device, or its bytes at that of a plain sum or negation, whichever is
longer. Sizes are DeepSeek-V3.2's, on a CPU smaller ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from sglang.benchmark_metadata.report import environment
from sglang.srt.layers.attention.nsa import indexer
from sglang.srt.layers.attention.nsa.sparse_mla import sparse_mla
from torch.profiler import ProfilerActivity, profile

LATENT, ROPE = 512, 64
CHECKED_ROWS = 8
KERNELS = ("attention", "index", "experts")  # methods of Bench
PEAK_SIZES = {"cuda": (8192, 1 << 28), "cpu": (256, 1 << 18)}  # side of the matrices, floats that are read


@dataclass(frozen=True)
class Sizes:
    """Of the model, and the rows and keys to try."""

    heads: int
    topk: int
    index_heads: int
    index_dim: int
    hidden: int
    intermediate: int
    context: int
    attention: tuple[tuple[int, int], ...]  # rows, keys of each
    index: tuple[tuple[int, int, int], ...]  # rows, keys of the last, rows of a request (0: one prefill)
    experts: tuple[tuple[int, int], ...]  # experts, of them a row
    expert_rows: tuple[int, ...]


SIZES = {
    "cuda": Sizes(
        *(128, 2048, 64, 128, 2048, 512, 7000),
        attention=(*product((1, 5, 16, 40, 160), (600, 2048)), (1024, 2048)),
        index=(
            *((7000, 7000, 0), (600, 7000, 0), (1024, 32768, 0)),
            *product((5, 40), (7000, 30000, 131072), (5,)),
            *((160, 3000, 5), (160, 30000, 5)),
        ),
        experts=((8, 2), (256, 8)),
        expert_rows=(1, 5, 40, 160, 7000),
    ),
    "cpu": Sizes(
        *(4, 64, 4, 32, 64, 32, 200),
        attention=((2, 64), (5, 20)),
        index=((50, 50, 0), (6, 100, 3)),
        experts=((8, 2),),
        expert_rows=(2, 40),
    ),
}


@dataclass(frozen=True)
class Work:
    """What a case cannot do without."""

    flops: int = 0
    bytes: int = 0  # read and written, each once


@dataclass
class Measurement:
    kernel: str
    case: str
    implementation: str
    us: float
    floor_us: float
    ratio: float  # of the two
    tflops: float
    gbytes: float  # per second
    error: float  # largest difference from the reference, as a share of its largest value

    def __str__(self) -> str:
        return (
            f"| {self.kernel} | {self.case} | {self.implementation} | {self.us:.1f} | {self.floor_us:.1f} "
            f"| {self.ratio:.1f} | {self.tflops:.1f} | {self.gbytes:.0f} | {self.error:.4f} |"
        )


class Bench:
    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds, self.sizes = torch.device(device), rounds, SIZES[device]
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)
        side, length = PEAK_SIZES[device]
        a, b = self.normal(side, side), self.normal(side, side)
        self.flops_per_us = 2 * side**3 / self.time(partial(torch.mm, a, b))
        source = torch.zeros(length, device=self.device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / self.time(partial(torch.neg, source, out=target))
        self.bytes_per_us = max(copied, source.nbytes / self.time(source.sum))

    def measurement(
        self, kernel: str, case: str, name: str, us: float, work: Work, error: float
    ) -> Measurement:
        floor = max(work.flops / self.flops_per_us, work.bytes / self.bytes_per_us)
        speeds = work.flops / us / 1e6, work.bytes / us / 1e3
        return Measurement(kernel, case, name, us, floor, us / floor, *speeds, error)

    def run(self, kernels: Iterable[str]) -> Iterator[Measurement]:
        for name in kernels:
            yield from getattr(self, name)()

    # ---- sparse MLA

    def attention(self) -> Iterator[Measurement]:
        size, scale = self.sizes, 192**-0.5
        kv = self.normal(2 * size.context, LATENT + ROPE)
        for rows, keys in size.attention:
            q = self.normal(rows, size.heads, LATENT + ROPE)
            slots = torch.full((rows, size.topk), -1, dtype=torch.int32, device=self.device)
            for row in slots:
                chosen = torch.randperm(size.context, generator=self.generator, device=self.device)[:keys]
                row[:keys] = chosen.sort().values
            lengths = torch.full((rows,), keys, dtype=torch.int32, device=self.device)
            some = slice(0, CHECKED_ROWS)
            expected = sparse_mla(q[some, :, :LATENT], q[some, :, LATENT:], kv, slots[some], scale)
            flops = 2 * rows * size.heads * keys * (2 * LATENT + ROPE)
            distinct = min(rows * keys, size.context)
            elements = distinct * (LATENT + ROPE) + rows * size.heads * (2 * LATENT + ROPE)
            work = Work(flops, elements * kv.element_size() + 4 * rows * keys)
            for name, attend in self.implementations_of_attention(lengths):
                error = relative_error(attend(q, kv, slots, scale)[some], expected)
                us = self.time(partial(attend, q, kv, slots, scale))
                yield self.measurement("sparse MLA", f"{rows} rows of {keys} keys", name, us, work, error)

    def implementations_of_attention(
        self, lengths: torch.Tensor
    ) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
        if self.device.type == "cpu":
            yield "torch", lambda q, *rest: sparse_mla(q[..., :LATENT], q[..., LATENT:], *rest)
            return
        from sglang.srt.layers.attention.nsa import sparse_mla_triton
        from sglang.srt.libraries.flashmla import MODULES, OPERATOR_DISTRIBUTIONS, find_flashmla

        yield "triton", lambda q, *rest: sparse_mla_triton.sparse_mla(q[..., :LATENT], q[..., LATENT:], *rest)
        for name in (*MODULES, *OPERATOR_DISTRIBUTIONS):
            try:
                library = find_flashmla(name)
            except (ImportError, OSError, AttributeError) as reason:
                print(f"{name} is left out: {reason}", file=sys.stderr)
                continue
            options = {"topk_length": lengths} if library.takes_lengths else {}
            yield (
                library.source,
                lambda q, kv, slots, scale, library=library, options=options: library.sparse_fwd(
                    q, kv[:, None], slots[:, None], scale, LATENT, **options
                )[0],
            )

    # ---- index scores and top-k

    def index(self) -> Iterator[Measurement]:
        size = self.sizes
        for rows, context, per_request in size.index:
            q = self.normal(rows, size.index_heads, size.index_dim)
            weights = torch.rand((rows, size.index_heads), generator=self.generator, device=self.device)
            requests = rows // per_request if per_request else 1
            keys = self.normal(requests * context + 1, size.index_dim)
            table = torch.arange(1, len(keys), dtype=torch.int32, device=self.device).view(requests, context)
            if per_request:
                lengths = torch.full((rows,), context, dtype=torch.int32, device=self.device)
                table_rows = torch.arange(requests, device=self.device)
            else:
                lengths = torch.arange(context - rows, context, dtype=torch.int32, device=self.device) + 1
                table_rows = torch.zeros(rows, dtype=torch.int64, device=self.device)
            last = slice(rows - min(rows, CHECKED_ROWS), rows)
            owners = table_rows.repeat_interleave(per_request or 1)[last]
            expected = indexer.select_topk(
                q[last], weights[last], keys, table, owners, lengths[last], size.topk, context
            )
            pairs = int(lengths[lengths > size.topk].sum())  # rows with fewer keys take them all
            inputs = sum(t.numel() * t.element_size() for t in (q, weights))
            inputs += requests * context * size.index_dim * keys.element_size()
            scores = Work(2 * pairs * size.index_heads * size.index_dim, inputs + 4 * pairs)
            picked = 4 * int(lengths.clamp(max=size.topk).sum())  # of the page table
            topk = Work(bytes=4 * pairs + picked + 4 * rows * size.topk)
            case, seen = f"{rows} rows of {context} keys", set()
            for select_topk in self.implementations_of_index():
                run = partial(
                    select_topk,
                    *(q, weights, keys, table, table_rows, lengths, size.topk, context),
                    rows_per_req=per_request or None,
                )
                differing = [
                    len(set(a.tolist()) ^ set(b.tolist())) / 2 for a, b in zip(run()[last], expected)
                ]  # of equal scores but for the last bit, either may be taken
                error = sum(differing) / (len(differing) * size.topk)
                for name, us in self.time_kernels(run).items():
                    if name not in seen:
                        seen.add(name)
                        work = topk if "topk" in name else scores
                        yield self.measurement("index", case, name, us, work, error)

    def implementations_of_index(self) -> Iterator[Callable[..., torch.Tensor]]:
        """On CUDA with the kernel library's kernels, where they are there, and with Triton's."""
        if self.device.type == "cpu":
            yield indexer.select_topk
            return
        from sglang.srt.layers.attention.nsa.indexer_triton import select_topk
        from sglang.srt.layers.attention.registry import triton_indexer

        yield triton_indexer(self.device)
        yield select_topk

    # ---- routed experts

    def experts(self) -> Iterator[Measurement]:
        size = self.sizes
        for count, chosen in size.experts:
            gate_up = self.normal(count, 2 * size.intermediate, size.hidden) * 0.02
            down = self.normal(count, size.hidden, size.intermediate) * 0.02
            for rows in size.expert_rows:
                x = self.normal(rows, size.hidden)
                experts = torch.rand((rows, count), generator=self.generator, device=self.device)
                experts = experts.topk(chosen).indices
                weights = torch.rand((rows, chosen), generator=self.generator, device=self.device)
                arguments = (x, weights, experts, gate_up, down)
                expected = one_expert_after_the_other(*arguments)
                flops = 6 * rows * chosen * size.intermediate * size.hidden
                matrices = 3 * len(experts.unique()) * size.intermediate * size.hidden
                work = Work(flops, (matrices + 2 * x.numel()) * x.element_size())
                for name, run in self.implementations_of_experts():
                    error = relative_error(run(*arguments), expected)
                    us = self.time(partial(run, *arguments))
                    case = f"{rows} rows, {chosen} of {count} experts"
                    yield self.measurement("experts", case, name, us, work, error)

    def implementations_of_experts(self) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
        if self.device.type == "cpu":
            yield "torch", one_expert_after_the_other
            return
        from sglang.srt.layers.moe_triton import routed_experts

        yield "triton", routed_experts
        if hasattr(torch.nn.functional, "grouped_mm"):
            yield "torch grouped_mm", torch_grouped

    # ---- tools

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator, device=self.device).to(self.dtype)

    def time(self, function: Callable[[], object]) -> float:
        """Median microseconds of a call; on CUDA of a replayed graph that holds it."""
        function()
        if self.device.type == "cpu":
            times = []
            for _ in range(self.rounds):
                start = time.perf_counter()
                function()
                times.append(1e6 * (time.perf_counter() - start))
            return statistics.median(times)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        times = []
        for _ in range(self.rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * start.elapsed_time(end))
        return statistics.median(times)

    def time_kernels(self, function: Callable[[], object]) -> dict[str, float]:
        """Mean microseconds of each of its kernels; on a CPU of all together."""
        if self.device.type == "cpu":
            return {"torch": self.time(function)}
        function()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(self.rounds):
                function()
            torch.cuda.synchronize()
        return {e.key: e.device_time_total / self.rounds for e in trace.key_averages() if e.device_time_total}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def one_expert_after_the_other(
    x: torch.Tensor,  # [T, hidden]
    weights: torch.Tensor,  # [T, K], float32
    experts: torch.Tensor,  # [T, K], int64
    gate_up: torch.Tensor,  # [E, 2 * I, hidden]
    down: torch.Tensor,  # [E, hidden, I]
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(down)):
        rows, place = (experts == expert).nonzero(as_tuple=True)
        gate, up = torch.nn.functional.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[expert]).float()
        out.index_add_(0, rows, y * weights[rows, place, None])
    return out


def torch_grouped(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The same by torch's grouped matrix products: sorted by expert, nothing read by the host."""
    pairs = experts.flatten()
    order = pairs.argsort(stable=True)
    counts = torch.zeros(len(down), dtype=torch.int32, device=x.device)
    ends = counts.scatter_add_(0, pairs, torch.ones_like(pairs, dtype=torch.int32)).cumsum(0).int()
    products = torch.nn.functional.grouped_mm
    gate, up = products(x[order // experts.shape[1]], gate_up.mT, offs=ends).chunk(2, dim=-1)
    y = products(torch.nn.functional.silu(gate) * up, down.mT, offs=ends)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=x.device)
    return (y[place].view(*experts.shape, -1).float() * weights[..., None]).sum(1).to(x.dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    bench = Bench(args.device, args.rounds)
    print(
        "| kernel | case | implementation | us | floor us | ratio | TFLOP/s | GB/s | error |\n"
        + "|---" * 9
        + "|"
    )
    results = []
    for result in bench.run(args.kernels):
        results.append(asdict(result))
        print(result, flush=True)
    if args.json:
        peaks = {"tflops": bench.flops_per_us / 1e6, "gbytes": bench.bytes_per_us / 1e3}
        machine = environment(torch.device(args.device))
        text = json.dumps({"machine": machine, "peaks": peaks, "results": results})
        args.json.write_text(text + "\n", encoding="utf-8")
    speeds = f"{bench.flops_per_us / 1e6:.1f} TFLOP/s, {bench.bytes_per_us / 1e3:.0f} GB/s"
    print(f"floors are those of {speeds}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
