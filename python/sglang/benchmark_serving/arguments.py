"""The command line, with SGLang's names."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from sglang.benchmark_serving.datasets import DATASETS
from sglang.benchmark_serving.endpoints import BACKENDS


def parse_args(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Ends the process with a usage message that names the flag where one is wrong."""
    parser = argparse.ArgumentParser("sglang.bench_serving", description=description)
    _add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        _check(args)
    except ValueError as error:
        parser.error(str(error))
    args.base_url = args.base_url or f"http://{args.host}:{args.port}"
    args.extra_request_body = json.loads(args.extra_request_body)
    args.headers = dict(pair.split("=", 1) for pair in args.header)
    if key := args.api_key or os.environ.get("OPENAI_API_KEY"):
        args.headers.setdefault("Authorization", f"Bearer {key}")
    return args


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--backend", choices=list(BACKENDS), default="sglang", help="the server's kind, and its endpoint")
    add("--base-url", help="instead of --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30000)
    add("--ready-check-timeout-sec", type=float, default=60, help="how long to wait for the server; 0: not")
    add(
        "--model", help="name to ask for (default: the first that the server has); a folder has the tokenizer"
    )
    add("--served-model-name", help="name to ask for, where --model is a folder")
    add("--api-key", help="default: the environment variable OPENAI_API_KEY")
    add("--header", nargs="+", default=[], metavar="NAME=VALUE", help="headers of every request")

    add = parser.add_argument_group("dataset").add_argument
    add("--dataset-name", choices=list(DATASETS), default="random", help="what the prompts are")
    add("--dataset-path", type=Path, help="the file of sharegpt (JSON) and custom (JSONL)")
    add("--num-prompts", type=int, default=100)
    add("--tokenizer", help="folder or name (default: --model's or the server's, if it is a local folder)")
    add("--random-input-len", type=int, default=256, help="longest random prompt, in tokens")
    add("--random-output-len", type=int, default=64, help="longest answer; custom's where a line has none")
    add("--random-range-ratio", type=float, default=0.0, help="shortest length, as a share of the longest")
    add("--sharegpt-output-len", type=int, help="tokens to ask for (default: the reply's own)")
    add("--sharegpt-context-len", type=int, help="leave out what is longer with its reply")
    add("--apply-chat-template", action="store_true", help="put each prompt into the tokenizer's template")
    add("--tokenize-prompt", action="store_true", help="send token ids, where the endpoint takes them")
    add("--seed", type=int, default=1)

    add = parser.add_argument_group("load").add_argument
    add("--request-rate", type=float, default=float("inf"), help="requests per second, Poisson; inf: at once")
    add("--max-concurrency", type=int, help="requests at the same time (default: no limit)")
    add("--warmup-requests", type=int, default=1)
    add("--flush-cache", action="store_true", help="empty the server's prefix cache before the run")

    add = parser.add_argument_group("request").add_argument
    add("--disable-stream", action="store_true", help="whole answers; then only their latency is known")
    add("--temperature", type=float, default=0.0)
    add("--disable-ignore-eos", action="store_true", help="let answers end where the model ends them")
    add("--return-logprob", action="store_true", help="ask for the logprob of every token")
    add("--top-logprobs-num", type=int, default=0, help="and of as many others")
    add("--logprob-start-len", type=int, default=-1, help="prompt logprobs from here on (sglang)")
    add("--extra-request-body", default="{}", help="JSON object merged into every request")

    add = parser.add_argument_group("result").add_argument
    add("--output-file", type=Path, help="append the result to this JSONL file")
    add(
        "--output-details",
        action="store_true",
        help="with lengths, latencies, text and error of each request",
    )
    add("--tag", help="a name of this run in the result")
    add("--disable-tqdm", action="store_true")


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError that names the flag."""
    for name in ("num_prompts", "random_input_len", "random_output_len", "max_concurrency",
                 "sharegpt_output_len", "sharegpt_context_len"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not args.request_rate > 0:
        raise ValueError(f"--request-rate must be above 0, got {args.request_rate}")
    if not 0 <= args.random_range_ratio <= 1:
        raise ValueError(f"--random-range-ratio must be in [0, 1], got {args.random_range_ratio}")
    if args.dataset_name in ("sharegpt", "custom") and args.dataset_path is None:
        raise ValueError(f"--dataset-name {args.dataset_name} needs --dataset-path")
    if args.dataset_path is not None and not args.dataset_path.is_file():
        raise ValueError(f"--dataset-path {args.dataset_path} is no file")
    if args.flush_cache and not BACKENDS[args.backend].sglang:
        raise ValueError(f"--flush-cache needs a backend of SGLang's, not --backend {args.backend}")
    if wrong := [pair for pair in args.header if "=" not in pair]:
        raise ValueError(f"--header must be NAME=VALUE, got {wrong[0]!r}")
    try:
        extra = json.loads(args.extra_request_body)
    except ValueError as error:
        raise ValueError(f"--extra-request-body is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise ValueError(f"--extra-request-body must be a JSON object, got {args.extra_request_body}")
