"""What speculation and the metadata path bring: tokens per second and memory of whole servers.

    python benchmark/speculation.py --model-path models/tiny-nsa --device cpu

Launches one server after another: without speculation, with it, and with the metadata computed once per
step in each layout. Each answers the same prompts, greedily, first one at a time and then together; the
answers are compared with those of the first server before anything is reported. A table, then JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from server_process import ROOT, children, free_port, our_command, our_environment, started
from tqdm import tqdm

FALLBACK_PROMPTS = ["import os\n\n\ndef ", "class Stack:\n    def ", "for line in lines:\n    ", "def test_"]


@dataclass(frozen=True)
class Config:
    """One server: speculation on or off, and how it gets its metadata."""

    name: str
    speculate: bool
    precompute: bool
    layout: str = "replicate"
    copy: str = "auto"

    def flags(self, steps: int) -> list[str]:
        if not self.speculate:
            return []
        flags = ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(steps)]
        if not self.precompute:
            return flags
        return [*flags, "--nsa-metadata-layout", self.layout, "--nsa-metadata-copy", self.copy]


CONFIGS = (
    Config("no speculation", False, False),
    Config("speculation, flag 0", True, False),
    Config("speculation, flag 1, replicate", True, True),
    Config("speculation, flag 1, shared", True, True, "shared"),
    Config("speculation, flag 1, in_graph", True, True, "in_graph"),
    Config("speculation, flag 1, indirect", True, True, "indirect"),
)


@dataclass
class Measurement:
    config: str
    concurrency: int
    tokens_per_second: float
    speedup: float  # over the first configuration at the same concurrency
    accept_length: float | None
    latency_ms: float  # mean, of a request
    same_tokens: float  # share of the answers that equal the first configuration's
    resident_mib: float  # both processes together


@contextmanager
def running_server(config: Config, args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yields (url, pid) of a server that is ready."""
    port = free_port()
    flags = ["--log-level", "warning", *config.flags(args.steps), *args.server_flags]
    command = our_command(args.model_path, args.device, port, flags)
    with started(command, port, our_environment(config.precompute)) as server:
        server.wait_ready()
        yield server.url, server.process.pid


def resident_mib(pid: int) -> float:
    """Resident memory of a process and of those it started (Linux)."""
    return sum(
        int(Path(f"/proc/{p}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
        for p in (pid, *children(pid))
    )


def load_prompts(args: argparse.Namespace) -> list[str]:
    """From held_out.jsonl beside the model, where it is; cut to `--input-chars` from the end."""
    path = Path(args.model_path) / "held_out.jsonl"
    if not path.exists():
        return (FALLBACK_PROMPTS * args.num_prompts)[: args.num_prompts]
    prompts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [p[-args.input_chars :] for p in prompts[: args.num_prompts]]


async def answer_all(
    url: str, prompts: list[str], concurrency: int, args: argparse.Namespace, title: str
) -> tuple[list[dict[str, Any]], float]:
    """The native answers to all prompts, and the seconds that they took."""
    limit = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=None)
    with tqdm(total=len(prompts), desc=title, leave=False, disable=args.disable_tqdm) as bar:
        async with aiohttp.ClientSession(timeout=timeout) as session:

            async def one(prompt: str) -> dict[str, Any]:
                sampling = {"temperature": 0, "max_new_tokens": args.output_len, "ignore_eos": True}
                body = {"text": prompt, "sampling_params": sampling}
                async with limit, session.post(url + "/generate", json=body) as response:
                    if response.status != 200:
                        raise SystemExit(f"{title}: HTTP {response.status}: {await response.text()}")
                    result = await response.json()
                bar.update()
                return result

            await one("warm up")
            async with session.post(url + "/flush_cache"):
                pass
            bar.reset()
            start = time.perf_counter()
            answers = await asyncio.gather(*map(one, prompts))
            return answers, time.perf_counter() - start


def measure(args: argparse.Namespace) -> list[Measurement]:
    prompts, results = load_prompts(args), []
    expected: list[list[int]] | None = None
    baseline: dict[int, float] = {}
    for config in [c for c in CONFIGS if c.name in args.configs]:
        with running_server(config, args) as (url, pid):
            for concurrency in args.concurrency:
                title = f"{config.name}, {concurrency} at a time"
                answers, seconds = asyncio.run(answer_all(url, prompts, concurrency, args, title))
                tokens = [a["output_ids"] for a in answers]
                expected = expected or tokens
                rate = sum(map(len, tokens)) / seconds
                passes = sum(a["meta_info"]["spec_verify_ct"] for a in answers)
                results.append(
                    Measurement(
                        config=config.name,
                        concurrency=concurrency,
                        tokens_per_second=rate,
                        speedup=rate / baseline.setdefault(concurrency, rate),
                        accept_length=sum(map(len, tokens)) / passes if passes else None,
                        latency_ms=1e3 * sum(a["meta_info"]["e2e_latency"] for a in answers) / len(answers),
                        same_tokens=sum(map(list.__eq__, tokens, expected)) / len(tokens),
                        resident_mib=resident_mib(pid),
                    )
                )
                print_row(results[-1])
    return results


def print_header() -> None:
    print(
        f"{'configuration':<32} {'at once':>7} {'tokens/s':>9} {'ratio':>6} {'accept':>7} "
        f"{'latency':>10} {'same':>6} {'resident':>10}"
    )


def print_row(m: Measurement) -> None:
    accept = "-" if m.accept_length is None else f"{m.accept_length:.2f}"
    print(
        f"{m.config:<32} {m.concurrency:>7} {m.tokens_per_second:>9.1f} {m.speedup:>5.2f}x {accept:>7} "
        f"{m.latency_ms:>7.0f} ms {m.same_tokens:>6.0%} {m.resident_mib:>6.0f} MiB",
        flush=True,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-path", default=str(ROOT / "models" / "tiny-nsa"))
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--steps", type=int, default=4, help="speculative steps")
    add("--num-prompts", type=int, default=16)
    add("--input-chars", type=int, default=1000, help="longest prompt, in characters")
    add("--output-len", type=int, default=64, help="tokens of each answer")
    add("--concurrency", type=int, nargs="+", default=[1, 8])
    names = [c.name for c in CONFIGS]
    add("--configs", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    add("--server-flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the servers")
    add("--json", type=Path, help="also write the JSON here")
    add("--disable-tqdm", action="store_true")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    print_header()
    results = measure(args)
    machine = {"device": args.device, "processor": platform.machine(), "cpus": os.cpu_count()}
    text = json.dumps({"machine": machine, "results": [asdict(m) for m in results]})
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
