"""How much arriving prompts slow down requests that decode, as their clients see it.

    python benchmark/prefill_interference.py --model-path models/tiny-nsa --rates 5 50 --bursts 2 0 -1

Starts a server for each --prefill-burst; one of them works at a time. Clients stream long answers, and the
time per token that they see is measured while prompts arrive at a fixed rate, each answered with one token,
and alone: before and after, since it grows with their length. Prompts have then arrived for twice the burst,
which uses it up where they are many.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import aiohttp
from profile_step import random_prompts
from server_process import free_port, our_command, our_environment, started
from sglang.srt.garbage_collection import freeze_gc
from sglang.srt.server_args import ServerArgs

SETTLING_S = 0.3  # until what was given up no longer runs
TICK_S = 0.2  # of the plot


@dataclass
class Measurement:
    burst: float  # --prefill-burst
    rate: float  # prompts a second
    alone_ms: float  # per token, mean of the running requests
    arriving_ms: float
    ratio: float
    longest_wait_ms: float  # between two tokens of a running request, while prompts arrive
    answered: int  # prompts, in the meantime
    median_ttft_ms: float | None  # theirs
    marks: list[float]  # seconds: alone until [1], measured from [2] to [3], alone again from [4] to [5]
    ticks: list[float] = field(repr=False)  # ms per token in each TICK_S from marks[0] on


@dataclass
class Stream:
    """A request that decodes: when its tokens came, and how many there were then."""

    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def tokens_at(self, moment: float) -> int:
        seen = bisect.bisect_right(self.times, moment)
        return self.tokens[seen - 1] if seen else 0

    def ms_per_token(self, start: float, end: float) -> float:
        return (end - start) * 1e3 / max(self.tokens_at(end) - self.tokens_at(start), 1)

    def longest_wait_ms(self, start: float, end: float) -> float:
        times = [start, *(t for t in self.times if start < t < end), end]
        return max(b - a for a, b in pairwise(times)) * 1e3


class Clients:
    """Those of one server. An asynchronous context manager: when it ends, all that still runs is given up."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        self.url, self.args = url, args
        self.tasks: list[asyncio.Task[None]] = []
        self.ttft: list[tuple[float, float]] = []  # of prompts: when it came, and its seconds
        vocab_size = json.loads((Path(args.model_path) / "config.json").read_text())["vocab_size"]
        self.running = random_prompts(args.running, args.prompt_len, vocab_size)
        arriving = random_prompts(64, args.arriving_len, vocab_size)
        self.arriving = [self.body(prompt, 1) for prompt in arriving]

    async def __aenter__(self) -> Clients:
        self.session = aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *exception: object) -> None:
        await give_up(self.tasks)
        await self.session.close()

    def body(self, prompt: list[int], max_tokens: int) -> bytes:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"model": self.args.model_path, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return json.dumps(body | {"ignore_eos": True, "stream": True, "stream_options": options}).encode()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(work))
        return self.tasks[-1]

    async def answer(self, body: bytes, stream: Stream) -> None:
        headers = {"Content-Type": "application/json"}
        async with self.session.post("/v1/completions", data=body, headers=headers) as response:
            if response.status != 200:
                raise SystemExit(f"{self.url}: HTTP {response.status}: {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                if not stream.tokens or tokens > stream.tokens[-1]:
                    stream.times.append(time.perf_counter())
                    stream.tokens.append(tokens)

    async def prompt(self, body: bytes) -> None:
        """Sends it, and notes when its token came."""
        sent, stream = time.perf_counter(), Stream()
        await self.answer(body, stream)
        self.ttft.append((stream.times[0], stream.times[0] - sent))

    async def arrive(self, rate: float) -> None:
        """Sends prompts until it is cancelled, and they with it."""
        began, prompts = time.perf_counter(), []
        try:
            for i in count():
                await asyncio.sleep(max(began + i / rate - time.perf_counter(), 0))
                prompts.append(asyncio.create_task(self.prompt(self.arriving[i % len(self.arriving)])))
        finally:
            await give_up(prompts)

    async def measure(self, burst: float, rate: float) -> Measurement:
        streams, seconds = [Stream() for _ in self.running], self.args.seconds
        running = [
            self.start(self.answer(self.body(prompt, self.args.max_new_tokens), stream))
            for prompt, stream in zip(self.running, streams)
        ]
        while not all(stream.tokens for stream in streams):
            await asyncio.sleep(0.01)
            check_they_run(running)
        await self.prompt(self.arriving[0])  # compiles what it needs
        marks = [time.perf_counter()]

        async def wait(seconds: float) -> None:
            await asyncio.sleep(seconds)
            marks.append(time.perf_counter())

        await wait(seconds / 2)
        arriving = self.start(self.arrive(rate))
        await wait(2 * max(burst, 0))
        await wait(seconds)
        await give_up([arriving])
        await wait(SETTLING_S)
        await wait(seconds / 2)
        check_they_run(running)
        await give_up(running)

        def per_token(start: float, end: float) -> float:
            return statistics.mean(stream.ms_per_token(start, end) for stream in streams)

        alone = (per_token(*marks[0:2]) + per_token(*marks[4:6])) / 2
        measured = marks[2:4]
        ttft = [seconds for at, seconds in self.ttft if measured[0] <= at < measured[1]]
        ticks = [marks[0] + i * TICK_S for i in range(int((marks[-1] - marks[0]) / TICK_S) + 1)]
        return Measurement(
            burst,
            rate,
            alone_ms=alone,
            arriving_ms=per_token(*measured),
            ratio=per_token(*measured) / alone,
            longest_wait_ms=max(stream.longest_wait_ms(*measured) for stream in streams),
            answered=len(ttft),
            median_ttft_ms=statistics.median(ttft) * 1e3 if ttft else None,
            marks=[mark - marks[0] for mark in marks],
            ticks=[per_token(a, b) for a, b in pairwise(ticks)],
        )


async def give_up(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Raises the error of one that failed before."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


def check_they_run(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()
            raise SystemExit("a request ended: --max-new-tokens is too small")


def shown(burst: float) -> str:
    return "no limit" if burst == -1 else f"{burst:g}"


async def measure_server(url: str, burst: float, args: argparse.Namespace, rows: list[Measurement]) -> None:
    """Appends to `rows` rate by rate, so that who is interrupted keeps what was measured."""
    for rate in args.rates:
        async with Clients(url, args) as clients:
            m = await clients.measure(burst, rate)
        rows.append(m)
        ttft = "-" if m.median_ttft_ms is None else f"{m.median_ttft_ms:.1f}"
        print(
            f"| {shown(burst)} | {rate:g} | {m.alone_ms:.3f} | {m.arriving_ms:.3f} | {m.ratio:.2f} "
            f"| {m.longest_wait_ms:.1f} | {m.answered} | {ttft} |",
            flush=True,
        )


def measure(args: argparse.Namespace, flags: list[str], logs: Path, rows: list[Measurement]) -> None:
    with ExitStack() as stack:
        servers = []
        for burst in args.bursts:
            port = free_port()
            ours = our_command(args.model_path, args.device, port, [*flags, f"--prefill-burst={burst:g}"])
            log = logs / f"burst_{burst:g}.log"
            servers.append(stack.enter_context(started(ours, port, our_environment(precompute=True), log)))
        print(f"the servers' output is in {logs}")
        titles = "burst s", "prompts/s", "ms a token", "with arrivals", "ratio", "longest wait ms", "answered"
        print(f"| {' | '.join(titles)} | TTFT ms |")
        print("|---" * 8 + "|", flush=True)
        freeze_gc()  # a pause of this process would count as the server's
        for burst, server in zip(args.bursts, servers):
            server.wait_ready()
            asyncio.run(measure_server(server.url, burst, args, rows))


def plot(rows: list[Measurement], path: Path) -> None:
    """A panel for each rate: time per token over time, a line for each burst."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = sorted({row.rate for row in rows})
    figure, panels = plt.subplots(
        1, len(rates), figsize=(4.5 * len(rates), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, rate in zip(panels[0], rates):
        for row in rows:
            if row.rate != rate:
                continue
            at = [(i + 0.5) * TICK_S - row.marks[1] for i in range(len(row.ticks))]
            ratios = [tick / row.alone_ms for tick in row.ticks]
            (line,) = axes.plot(at, ratios, label=f"--prefill-burst {row.burst:g}")
            axes.axvspan(*(mark - row.marks[1] for mark in row.marks[2:4]), color=line.get_color(), alpha=0.1)
        axes.axhline(1.3, color="gray", linewidth=0.8, linestyle="--")
        axes.set_title(f"{rate:g} prompts/s", fontsize=10)
        axes.set_xlabel("seconds since prompts arrive; shaded: measured", fontsize=9)
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", alpha=0.25)
    panels[0][0].set_ylabel("time per token, of that alone", fontsize=9)
    panels[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-path", required=True)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--steps", type=int, default=4, help="speculative steps")
    bursts = [-1.0, ServerArgs.prefill_burst, 0.0]
    add("--bursts", type=float, nargs="+", default=bursts, help="--prefill-burst of each server")
    add("--rates", type=float, nargs="+", default=[5.0, 50.0], help="prompts a second")
    add("--running", type=int, default=4, help="requests that decode")
    add("--prompt-len", type=int, default=64, help="of these")
    add("--arriving-len", type=int, default=1000, help="tokens of each prompt that arrives")
    add("--chunk", type=int, default=512, help="--chunked-prefill-size")
    add("--seconds", type=float, default=3.0, help="of each measurement; half of it alone, before and after")
    add("--max-new-tokens", type=int, default=3800, help="of the requests that decode")
    add("--json", type=Path, help="also write the figures here")
    add("--plot", type=Path, help="also write a picture (PNG) here")
    add("--logs", type=Path, help="folder for the servers' output (default: a new temporary one)")
    add("--server-flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the servers")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logs = args.logs or Path(tempfile.mkdtemp(prefix="prefill_interference_"))
    logs.mkdir(parents=True, exist_ok=True)
    flags = ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(args.steps)]
    flags += ["--chunked-prefill-size", str(args.chunk), "--disable-radix-cache", *args.server_flags]
    rows: list[Measurement] = []
    try:
        measure(args, flags, logs, rows)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows]) + "\n", encoding="utf-8")
    if args.plot and rows:
        plot(rows, args.plot)
    return 0 if len(rows) == len(args.bursts) * len(args.rates) else 1


if __name__ == "__main__":
    sys.exit(main())
