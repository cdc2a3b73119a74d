"""Stand-alone fuzzer: random copies and generations, each compared with plain torch to the last byte.

    python sgl-kernel/tests/fuzz_metadata.py --device cuda --seconds 120 --cases 100000 --jobs 8

Stops when either limit is reached, or at the first difference, which it prints with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "python")]

import sgl_kernel  # noqa: E402
import torch  # noqa: E402
from copy_cases import CopyRig, random_copy_case  # noqa: E402
from generate_cases import GenerateRig, random_generate_case  # noqa: E402
from replay_cases import ReplayRig, random_replay_case  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after this time")
    parser.add_argument("--cases", type=int, default=1_000_000_000, help="stop after this many cases")
    parser.add_argument("--runs", type=int, default=8, help="runs (each a case of its own) of one plan")
    parser.add_argument("--seed", type=int, default=0, help="of the first plan; plan i has seed + i")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cases")
    return parser.parse_args()


def check_plan(seed: int, runs: int, device: str) -> int:
    """Half of the plans are generations; returns the number of cases checked."""
    rng = random.Random(seed)
    if seed % 4 == 0:
        return CopyRig(random_copy_case(rng.randint, runs), device).check()
    if seed % 4 == 1:
        return ReplayRig(random_replay_case(rng.randint, runs), device).check()
    return GenerateRig(random_generate_case(rng.randint, runs), device).check()


def fuzz(args: argparse.Namespace, job: int) -> tuple[int, int, str | None]:
    """Plans seed + job, seed + job + jobs, ...; returns (plans, cases, the first difference)."""
    torch.set_num_threads(1)
    start = time.monotonic()
    plans = cases = 0
    while cases < args.cases / args.jobs and time.monotonic() - start < args.seconds:
        seed = args.seed + job + plans * args.jobs
        try:
            cases += check_plan(seed, args.runs, args.device)
        except AssertionError as difference:
            return plans, cases, f"repeat with --seed {seed} --cases 1: {difference}"
        plans += 1
    return plans, cases, None


def main() -> None:
    args = parse_args()
    error = sgl_kernel.load_error(args.device)
    if error is not None:
        sys.exit(error)
    start = time.monotonic()
    if args.jobs == 1:
        results = [fuzz(args, 0)]
    else:
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            results = pool.starmap(fuzz, [(args, job) for job in range(args.jobs)])
    plans, cases = (sum(result[k] for result in results) for k in (0, 1))
    for *_, difference in results:
        if difference is not None:
            sys.exit(f"DIFFERENCE within {cases} cases on {args.device}; {difference}")
    elapsed = time.monotonic() - start
    print(f"{cases} cases ({plans} plans) on {args.device} in {elapsed:.1f} s: no difference")


if __name__ == "__main__":
    main()
