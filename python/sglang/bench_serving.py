"""Load generator: streams completions from an OpenAI-compatible server and reports throughput and latency.

    python -m sglang.bench_serving --backend sglang --port 30000 --dataset-name random --num-prompts 100

`--dataset-name` is `random`, or the path of a JSONL file whose lines hold "prompt" (a string or token ids)
and optionally "max_tokens".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import keyword
import random
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

PERCENTILES = (50, 90, 99)
WORDS = keyword.kwlist


@dataclass(frozen=True)
class Sample:
    prompt: str | list[int]
    max_tokens: int


@dataclass
class Result:
    """One request as the client saw it. Times are seconds of `time.perf_counter`."""

    start: float
    arrivals: list[float] = field(default_factory=list)  # of each piece of text
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.start

    @property
    def tpot(self) -> float:
        """Time per token after the first."""
        return (self.end - self.arrivals[0]) / max(self.completion_tokens - 1, 1)

    @property
    def latency(self) -> float:
        return self.end - self.start


def random_samples(args: argparse.Namespace, tokenizer: Any | None) -> list[Sample]:
    """Prompts of random words. Lengths are uniform in [ratio * length, length].

    With a tokenizer a prompt is token ids of exactly that length; without one the length counts words.
    """
    rng = random.Random(args.seed)

    def length(longest: int) -> int:
        return rng.randint(max(1, int(longest * args.random_range_ratio)), longest)

    def prompt(count: int) -> str | list[int]:
        text = " ".join(rng.choices(WORDS, k=count))
        return text if tokenizer is None else tokenizer.encode(text, add_special_tokens=False)[:count]

    return [
        Sample(prompt(length(args.random_input_len)), length(args.random_output_len))
        for _ in range(args.num_prompts)
    ]


def load_tokenizer(args: argparse.Namespace) -> Any | None:
    """`--tokenizer`, or the one that a server of this machine says it has; else None."""
    path = args.tokenizer
    if path is None and args.backend == "sglang":
        path = asyncio.run(get_json(args, "/get_model_info"))["tokenizer_path"]
        path = path if Path(path).is_dir() else None
    if path is None:
        return None
    from transformers import AutoTokenizer  # seconds to import, and not always needed

    return AutoTokenizer.from_pretrained(path)


def file_samples(path: Path, count: int, output_len: int) -> list[Sample]:
    """The first `count` lines, from the start again where the file is shorter."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = next((i for i, line in enumerate(lines, 1) if "prompt" not in line), None)
    if wrong is not None or not lines:
        raise ValueError(f"{path}: " + (f"line {wrong} has no 'prompt'" if wrong else "no lines"))
    return [
        Sample(line["prompt"], line.get("max_tokens", output_len))
        for line in (lines[i % len(lines)] for i in range(count))
    ]


async def run_request(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Result:
    """Streams one completion. Errors are counted, not raised."""
    result = Result(time.perf_counter())
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}: {(await response.text())[:200]}")
            async for chunk in server_sent_events(response.content):
                if "error" in chunk:
                    raise ValueError(str(chunk["error"].get("message", chunk["error"])))
                if any(c.get("text") or c.get("finish_reason") for c in chunk["choices"]):
                    result.arrivals.append(time.perf_counter())
                if usage := chunk.get("usage"):
                    result.prompt_tokens = usage["prompt_tokens"]
                    result.completion_tokens = usage["completion_tokens"]
        if not result.arrivals:
            raise ValueError("the stream held no text")
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError) as error:
        result.error = f"{type(error).__name__}: {error}"
    result.end = result.arrivals[-1] if result.arrivals else time.perf_counter()
    return result


async def server_sent_events(stream: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each `data:` line, until `[DONE]`."""
    async for line in stream:
        text = line.strip()
        if text == b"data: [DONE]":
            return
        if text.startswith(b"data:"):
            yield json.loads(text[5:])


async def run_benchmark(args: argparse.Namespace, samples: list[Sample]) -> tuple[list[Result], float]:
    """All requests; returns them and the seconds they took together."""
    limit = asyncio.Semaphore(args.max_concurrency or len(samples))
    rng = random.Random(args.seed)
    bar = tqdm(total=len(samples), desc="requests", disable=args.disable_tqdm)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        base_url(args), timeout=timeout, headers=headers(args), connector=connector, read_bufsize=1 << 20
    ) as session:
        model = args.model or (await get_json(args, "/v1/models"))["data"][0]["id"]

        async def one(sample: Sample) -> Result:
            async with limit:
                result = await run_request(session, "/v1/completions", request_body(args, model, sample))
            bar.update()
            return result

        for sample in samples[: args.warmup_requests]:
            warm = await run_request(session, "/v1/completions", request_body(args, model, sample))
            if warm.error:
                raise SystemExit(f"the warm-up request failed: {warm.error}")
        start = time.perf_counter()
        tasks = []
        for sample in samples:
            tasks.append(asyncio.create_task(one(sample)))
            if args.request_rate != float("inf"):
                await asyncio.sleep(rng.expovariate(args.request_rate))
        results = await asyncio.gather(*tasks)
        duration = time.perf_counter() - start
        bar.close()
    return results, duration


def base_url(args: argparse.Namespace) -> str:
    return args.base_url or f"http://{args.host}:{args.port}"


def headers(args: argparse.Namespace) -> dict[str, str]:
    return {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}


async def get_json(args: argparse.Namespace, path: str) -> Any:
    async with (
        aiohttp.ClientSession(base_url(args), headers=headers(args)) as session,
        session.get(path) as response,
    ):
        response.raise_for_status()
        return await response.json()


def request_body(args: argparse.Namespace, model: str, sample: Sample) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "prompt": sample.prompt,
        "max_tokens": sample.max_tokens,
        "temperature": args.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if args.backend == "sglang" and not args.disable_ignore_eos:
        body["ignore_eos"] = True  # so that output lengths are those asked for
    return body | json.loads(args.extra_request_body)


def accept_length(args: argparse.Namespace) -> float | None:
    """Tokens per verification since the server started; None where the server does not say."""
    if args.backend != "sglang":
        return None
    return asyncio.run(get_json(args, "/get_server_info"))["internal_states"][0].get("avg_spec_accept_length")


def summarize(args: argparse.Namespace, results: list[Result], duration: float) -> dict[str, Any]:
    """Everything that is reported, as one flat object."""
    good = [r for r in results if r.error is None]
    gaps = [b - a for r in good for a, b in zip(r.arrivals, r.arrivals[1:])]
    prompt, output = sum(r.prompt_tokens for r in good), sum(r.completion_tokens for r in good)
    summary: dict[str, Any] = {
        "backend": args.backend,
        "dataset_name": args.dataset_name,
        "request_rate": args.request_rate if args.request_rate != float("inf") else "inf",
        "max_concurrency": args.max_concurrency,
        "num_prompts": len(results),
        "completed": len(good),
        "errors": len(results) - len(good),
        "duration": duration,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(good) / duration,
        "input_throughput": prompt / duration,
        "output_throughput": output / duration,
        "total_throughput": (prompt + output) / duration,
        "concurrency": sum(r.latency for r in good) / duration,
    }
    for name, seconds in (
        ("ttft", [r.ttft for r in good]),
        ("tpot", [r.tpot for r in good if r.completion_tokens > 1]),
        ("itl", gaps),
        ("e2e_latency", [r.latency for r in good]),
    ):
        summary |= statistics(name, seconds)
    return summary


def statistics(name: str, seconds: Iterable[float]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds; None where nothing was measured."""
    values = np.array(list(seconds)) * 1e3
    keys = ["mean", "median", *(f"p{p}" for p in PERCENTILES if p != 50)]
    if not values.size:
        return {f"{key}_{name}_ms": None for key in keys}
    numbers = [values.mean(), *np.percentile(values, PERCENTILES)]
    return {f"{key}_{name}_ms": float(number) for key, number in zip(keys, numbers)}


def report(summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        if name != "first_errors":
            print(f"{name:<28}", f"{value:>14.2f}" if isinstance(value, float) else f"{value!s:>14}")
    for error in summary["first_errors"]:
        print(f"error: {error}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sglang.bench_serving", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backend", choices=("sglang", "openai"), default="sglang", help="openai: no SGLang extras are sent")
    add("--base-url", help="instead of --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30000)
    add("--model", help="name to ask for (default: the first that the server has)")
    add("--api-key")
    add("--dataset-name", default="random", help="random, or the path of a JSONL file")
    add("--num-prompts", type=int, default=100)
    add("--random-input-len", type=int, default=256, help="longest random prompt, in tokens")
    add("--random-output-len", type=int, default=64, help="longest answer; the file's default for max_tokens")
    add("--random-range-ratio", type=float, default=1.0, help="shortest length, as a share of the longest")
    add("--tokenizer", help="counts the tokens of random prompts (default: the server's, if it is local)")
    add("--request-rate", type=float, default=float("inf"), help="requests per second, Poisson; inf: at once")
    add("--max-concurrency", type=int, help="requests at the same time (default: no limit)")
    add("--warmup-requests", type=int, default=1)
    add("--temperature", type=float, default=0.0)
    add("--disable-ignore-eos", action="store_true", help="let answers end where the model ends them")
    add("--extra-request-body", default="{}", help="JSON object merged into every request")
    add("--seed", type=int, default=1)
    add("--output-file", type=Path, help="append the summary and every request to this JSONL file")
    add("--disable-tqdm", action="store_true")
    return parser


def load_samples(args: argparse.Namespace) -> list[Sample]:
    if args.dataset_name != "random":
        return file_samples(Path(args.dataset_name), args.num_prompts, args.random_output_len)
    return random_samples(args, load_tokenizer(args))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError naming the flag."""
    for name in ("num_prompts", "random_input_len", "random_output_len", "max_concurrency"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not args.request_rate > 0:
        raise ValueError(f"--request-rate must be above 0, got {args.request_rate}")
    if not 0 < args.random_range_ratio <= 1:
        raise ValueError(f"--random-range-ratio must be in (0, 1], got {args.random_range_ratio}")


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where any request failed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
        samples = load_samples(args)
        results, duration = asyncio.run(run_benchmark(args, samples))
        summary = summarize(args, results, duration) | {"accept_length": accept_length(args)}
    except aiohttp.ClientError as error:
        print(f"{base_url(args)}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        parser.error(str(error))
    summary["first_errors"] = [r.error for r in results if r.error][:5]
    report(summary)
    if args.output_file:
        with args.output_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(summary | {"requests": [asdict(r) for r in results]}) + "\n")
    return 1 if summary["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
