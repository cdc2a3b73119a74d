"""Benchmark of the metadata paths, and a soak test of their correctness.

    python -m sglang.bench_metadata --device cpu --quick
    python -m sglang.bench_metadata --device cuda --grid h200 --json results.json --plot pictures/
    python -m sglang.bench_metadata --device cuda --soak 100000
    python -m sglang.bench_metadata --replot results.json --plot pictures/

Every route is checked against the torch reference, with poisoned buffers, before it is measured. What the
columns mean and how they are measured: docs/metadata.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from sglang.benchmark_metadata.cases import GRIDS
from sglang.benchmark_metadata.measure import Budget
from sglang.benchmark_metadata.plots import plot_all
from sglang.benchmark_metadata.report import environment, header
from sglang.benchmark_metadata.run import Settings, run_grid

_CPU_BYTES = 4 << 30
_LINE_SECONDS = {"one": 0.1, "quick": 0.1, "full": 0.1, "h200": 0.02}  # in each of the rounds


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sglang.bench_metadata", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--grid", choices=list(GRIDS), default="full", help="which cases to measure")
    parser.add_argument("--quick", action="store_true", help="the same as --grid quick")
    parser.add_argument("--draft-seqlens", choices=["committed", "step"], default="committed",
                        help="what each draft step counts; committed is SGLang's rule for NSA")  # fmt: skip
    parser.add_argument("--page-size", type=int, default=64, help="tokens in a page")
    parser.add_argument("--threads", type=int, default=1,
                        help="torch threads on the CPU; more are easily disturbed by other load")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write pictures to DIR")
    parser.add_argument(
        "--replot", type=Path, metavar="FILE", help="plot an earlier --json instead of measuring"
    )
    parser.add_argument("--soak", type=int, metavar="COUNT", help="verify COUNT replays instead of measuring")
    args = parser.parse_args(argv)
    if args.quick:
        args.grid = "quick"
    if args.replot is not None and args.plot is None:
        parser.error("--replot needs --plot DIR")
    if args.page_size < 1 or 64 % args.page_size:
        parser.error(f"--page-size must divide 64, got {args.page_size}")
    if args.device == "cuda" and args.replot is None and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.plot is not None:
        import matplotlib  # noqa: F401  missing: say so before anything is measured

    device = torch.device(args.device)
    if args.replot is not None:
        return _plot(json.loads(args.replot.read_text()), args.plot)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write into the progress bar
    torch.set_num_threads(args.threads)
    print("  ".join(f"{name}: {value}" for name, value in environment(device).items()))
    if args.soak is not None:
        from sglang.benchmark_metadata.soak import soak

        print(soak(args.soak, device, progress=True))
        return 0
    return _benchmark(args, device)


def _benchmark(args: argparse.Namespace, device: torch.device) -> int:
    cases = [
        replace(case, draft_seqlens=args.draft_seqlens, page_size=args.page_size)
        for case in GRIDS[args.grid]()
    ]
    max_bytes = _CPU_BYTES
    if device.type == "cuda":
        max_bytes = torch.cuda.mem_get_info(device)[0] // 2
    started = time.perf_counter()
    print(header(), flush=True)
    rows = run_grid(cases, Settings(device, Budget(_LINE_SECONDS[args.grid]), max_bytes))
    skipped = sum(row.skipped is not None for row in rows)
    print(f"{len(rows) - skipped} rows, {skipped} skipped, {time.perf_counter() - started:.1f} s")
    about = environment(device)
    results = [{**row.json(), **{f"env_{name}": value for name, value in about.items()}} for row in rows]
    if args.plot is not None:
        _plot(results, args.plot)
    if args.json is not None:
        args.json.write_text("[\n" + ",\n".join(json.dumps(r) for r in results) + "\n]\n")
        print(f"wrote {args.json}")
    else:
        print(json.dumps(results))
    return 0


def _plot(results: list[dict], folder: Path) -> int:
    for path in plot_all(results, folder):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
