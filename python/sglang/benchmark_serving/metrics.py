"""The figures of a run, under SGLang's names."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from sglang.benchmark_serving.endpoints import Result

STATISTICS = {
    "mean": np.mean,
    "median": np.median,
    "std": np.std,
    **{f"p{p}": lambda values, p=p: np.percentile(values, p) for p in (90, 95, 99)},
    "max": np.max,
}


def summarize(
    args: argparse.Namespace, results: list[Result], duration: float, tokenizer: Any | None
) -> dict[str, Any]:
    """Everything that is reported, as one flat object. Figures that were not measured are None."""
    good = [r for r in results if r.error is None]
    prompt, output = sum(r.prompt_tokens for r in good), sum(r.completion_tokens for r in good)
    summary: dict[str, Any] = {
        "tag": args.tag,
        "backend": args.backend,
        "dataset_name": args.dataset_name,
        "request_rate": args.request_rate if args.request_rate != float("inf") else "inf",
        "max_concurrency": args.max_concurrency,
        "random_input_len": args.random_input_len,
        "random_output_len": args.random_output_len,
        "random_range_ratio": args.random_range_ratio,
        "sharegpt_output_len": args.sharegpt_output_len,
        "num_prompts": len(results),
        "completed": len(good),
        "failed": len(results) - len(good),
        "duration": duration,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "total_output_tokens_retokenized": tokenizer and _retokenized(good, tokenizer),
        "request_throughput": len(good) / duration,
        "input_throughput": prompt / duration,
        "output_throughput": output / duration,
        "total_throughput": (prompt + output) / duration,
        "max_output_tokens_per_s": _busiest_second(good),
        "concurrency": sum(r.latency for r in good) / duration,
        "max_concurrent_requests": _most_at_once(good),
    }
    for name, seconds in (
        ("ttft", [r.ttft for r in good]),
        ("tpot", [r.tpot for r in good]),
        ("itl", [gap for r in good for gap in r.inter_token_latencies]),
        ("e2e_latency", [r.latency for r in good]),
    ):
        summary |= statistics(name, (s for s in seconds if s is not None))
    return summary


def details(results: list[Result]) -> dict[str, list[Any]]:
    """One entry for each request, in order. Times are seconds."""
    return {
        "input_lens": [r.prompt_tokens for r in results],
        "output_lens": [r.completion_tokens for r in results],
        "ttfts": [r.ttft for r in results],
        "itls": [r.inter_token_latencies for r in results],
        "latencies": [r.latency for r in results],
        "generated_texts": [r.text for r in results],
        "errors": [r.error or "" for r in results],
    }


def statistics(name: str, seconds: Iterable[float]) -> dict[str, float | None]:
    """In milliseconds; None where nothing was measured."""
    values = np.array(list(seconds)) * 1e3
    return {
        f"{key}_{name}_ms": float(statistic(values)) if values.size else None
        for key, statistic in STATISTICS.items()
    }


def _retokenized(results: list[Result], tokenizer: Any) -> int:
    return sum(len(tokenizer.encode(r.text, add_special_tokens=False)) for r in results)


def _busiest_second(results: list[Result]) -> float | None:
    """Most tokens that came within one second of the run; None where nothing was streamed."""
    start = min((r.start for r in results), default=0.0)
    buckets: Counter[int] = Counter()
    for result in results:
        before = 0
        for time, tokens in result.arrivals:
            buckets[int(time - start)] += tokens - before
            before = tokens
    return float(max(buckets.values())) if buckets else None


def _most_at_once(results: list[Result]) -> int:
    changes = sorted([(r.start, 1) for r in results] + [(r.end, -1) for r in results])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


def report(summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        if not isinstance(value, (dict, list)):
            print(f"{name:<32}", f"{value:>14.2f}" if isinstance(value, float) else f"{value!s:>14}")
