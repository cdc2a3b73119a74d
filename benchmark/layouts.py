"""Time per output token of whole servers, by metadata layout: the same prompts, one server after another.

    python benchmark/layouts.py --device cuda --json layouts.json

Each server decodes all requests at once, with speculation, each after a prompt of its own. What is compared
is decoding: a first round leaves the prompts in the prefix cache, the rounds after it are measured. The
answers are compared with those of the first server. Without --model-path the model is a random one with the
attention of DeepSeek-V3.2 (top-k of 2048) and little else, so that what differs is not drowned.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from server_process import ROOT
from sglang.bench_serving import benchmark
from sglang.benchmark_metadata.report import environment
from sglang.benchmark_serving.arguments import parse_args
from speculation import Config, running_server

CONFIGS = (
    Config("flag 0", True, False),
    Config("replicate, fused", True, True),
    Config("replicate, direct", True, True, copy="direct"),
    Config("shared", True, True, "shared"),
    Config("in_graph", True, True, "in_graph"),
    Config("indirect", True, True, "indirect"),
)
# DeepSeek-V3.2's attention on a narrow model.
V32_ATTENTION = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
ROOM = 512  # tokens of a sequence beyond prompt and answer: drafts, the end of a page


@dataclass
class Measurement:
    layout: str
    tpot_ms: float  # median over rounds of the mean over requests
    tpot_rounds_ms: list[float]
    tokens_per_second: float  # of the median round, prompts from the cache included
    ratio: float  # tpot of the first server / this tpot
    accept_length: float | None
    same_tokens: float  # share of the answers that equal the first server's
    fallbacks: int


@contextmanager
def model_folder(args: argparse.Namespace) -> Iterator[str]:
    if args.model_path:
        yield args.model_path
        return
    sys.path.insert(0, str(ROOT))
    from scripts.make_dummy_model import make_dummy_model

    with tempfile.TemporaryDirectory() as folder:
        longest = args.input_len + args.output_len + ROOM
        yield str(make_dummy_model(folder, max_position_embeddings=longest, **V32_ATTENTION))


def server_flags(args: argparse.Namespace) -> list[str]:
    """Room for all requests at once, so that nobody waits and no prompt leaves the cache."""
    tokens = args.num_prompts * (args.input_len + args.output_len + ROOM)
    flags = ["--max-running-requests", args.num_prompts, "--cuda-graph-max-bs", args.num_prompts]
    flags += ["--max-total-tokens", tokens, "--context-length", args.input_len + args.output_len + ROOM]
    if args.device == "cuda":
        flags += ["--dtype", "bfloat16"]
    return [*map(str, flags), *args.server_flags]


def one_round(url: str, model: str, args: argparse.Namespace) -> tuple[float, float, list[str], dict]:
    """Mean time per output token in ms, tokens per second, the answers, the server's metadata."""
    flags = ["--backend", "sglang", "--base-url", url, "--dataset-name", "random-ids", "--disable-tqdm"]
    flags += ["--random-input-len", str(args.input_len), "--random-output-len", str(args.output_len)]
    flags += ["--random-range-ratio", "1", "--num-prompts", str(args.num_prompts), "--tokenizer", model]
    flags += ["--warmup-requests", "0", "--seed", "1"]
    summary, results = asyncio.run(benchmark(parse_args(flags, "")))
    errors = [r.error for r in results if r.error]
    if errors:
        raise SystemExit(f"{url}: {errors[0]}")
    state = summary["server_info"]["internal_states"][0]
    return summary["mean_tpot_ms"], summary["output_throughput"], [r.text for r in results], state


def measure(args: argparse.Namespace) -> list[Measurement]:
    measurements: list[Measurement] = []
    expected: list[str] = []
    args.server_flags = server_flags(args)
    with model_folder(args) as model:
        args.model_path = model
        for config in [c for c in CONFIGS if c.name in args.layouts]:
            with running_server(config, args) as (url, _):
                rounds = [one_round(url, model, args) for _ in range(1 + args.rounds)][1:]
            times = [tpot for tpot, *_ in rounds]
            tpot, rate, answers, state = sorted(rounds, key=lambda r: r[0])[len(rounds) // 2]
            expected = expected or answers
            first = measurements[0].tpot_ms if measurements else statistics.median(times)
            measurements.append(
                Measurement(
                    layout=config.name,
                    tpot_ms=round(tpot, 4),
                    tpot_rounds_ms=[round(t, 4) for t in times],
                    tokens_per_second=round(rate, 1),
                    ratio=round(first / tpot, 4),
                    accept_length=state["avg_spec_accept_length"],
                    same_tokens=sum(map(str.__eq__, answers, expected)) / len(answers),
                    fallbacks=state["nsa_metadata"]["fallbacks"],
                )
            )
            print_row(measurements[-1])
    return measurements


def print_header(args: argparse.Namespace) -> None:
    print(f"{args.num_prompts} requests, prompts of {args.input_len} tokens, {args.output_len} new ones each")
    print(f"{'layout':<20} {'TPOT':>9} {'ratio':>7} {'tokens/s':>9} {'accept':>7} {'same':>6}  rounds")


def print_row(m: Measurement) -> None:
    accept = "-" if m.accept_length is None else f"{m.accept_length:.2f}"
    rounds = ", ".join(f"{t:.3f}" for t in m.tpot_rounds_ms)
    print(
        f"{m.layout:<20} {m.tpot_ms:>6.3f} ms {m.ratio:>6.3f}x {m.tokens_per_second:>9.1f} {accept:>7} "
        f"{m.same_tokens:>6.0%}  {rounds}",
        flush=True,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-path", help="default: a random model with DeepSeek-V3.2's attention")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--steps", type=int, default=4, help="speculative steps")
    add("--num-prompts", type=int, default=32, help="requests, all at the same time")
    add("--input-len", type=int, default=16384, help="tokens of each prompt")
    add("--output-len", type=int, default=256, help="tokens of each answer")
    add("--rounds", type=int, default=3, help="measured, after one that fills the prefix cache")
    names = [c.name for c in CONFIGS]
    add("--layouts", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    add("--server-flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the servers")
    add("--json", type=Path, help="also write the JSON here")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    print_header(args)
    measurements = measure(args)
    if args.json:
        run = {name: getattr(args, name) for name in ("num_prompts", "input_len", "output_len", "steps")}
        result = {"machine": environment(torch.device(args.device)), "run": run}
        result["results"] = [asdict(m) for m in measurements]
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
