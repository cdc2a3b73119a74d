"""Load generator: sends prompts to a server, and reports throughput and latency.

    python -m sglang.bench_serving --backend sglang --port 30000 --dataset-name random --num-prompts 100
    python -m sglang.bench_serving --backend vllm --base-url http://127.0.0.1:8000 --dataset-name sharegpt \
        --dataset-path conversations.json --tokenizer folder --request-rate 4 --output-file out.jsonl

Flags and the fields of the result have SGLang's names. Latencies are the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

import aiohttp

from sglang.benchmark_serving.arguments import parse_args
from sglang.benchmark_serving.datasets import load_samples, load_tokenizer
from sglang.benchmark_serving.endpoints import Result
from sglang.benchmark_serving.metrics import details, report, summarize
from sglang.benchmark_serving.requests import Server
from sglang.srt.garbage_collection import freeze_gc

SHOWN_ERRORS = 5


async def benchmark(args: argparse.Namespace) -> tuple[dict[str, Any], list[Result]]:
    """The figures of a run, and its requests. Raises ValueError, OSError and aiohttp.ClientError."""
    async with Server(args) as server:
        await server.wait_ready()
        tokenizer = load_tokenizer(await server.tokenizer_name())
        samples = load_samples(args, tokenizer, server.backend.endpoint.takes_ids)
        freeze_gc()  # a pause of this process would count as the server's
        results, duration = await server.run(samples)
        info = await server.info()
    summary = summarize(args, results, duration, tokenizer)
    state = info["internal_states"][0] if info else {}
    return summary | {"accept_length": state.get("avg_spec_accept_length"), "server_info": info}, results


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where any request failed, or the server."""
    args = parse_args(argv, __doc__.splitlines()[0])
    try:
        summary, results = asyncio.run(benchmark(args))
    except aiohttp.ClientError as error:
        print(f"{args.base_url}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"sglang.bench_serving: {error}", file=sys.stderr)
        return 2
    report(summary)
    for error in [r.error for r in results if r.error][:SHOWN_ERRORS]:
        print(f"error: {error}")
    if args.output_file:
        with args.output_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(summary | (details(results) if args.output_details else {})) + "\n")
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
