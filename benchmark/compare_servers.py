"""Output tokens/s, TTFT and TPOT of servers that are started here and answer the same prompts.

    python benchmark/compare_servers.py --model-path models/tiny-nsa --cases 200x1 200x8 \
        --ours auto "" --ours torch "--nsa-prefill-backend torch --nsa-decode-backend torch" \
        --server other "python -m other.server --port {port}" openai --together

A case LENxN sends prompts of LEN random token ids, N at a time. Each round has prompts of its own, the same
for all servers; a first round warms up and is not counted. Figures are medians over rounds.
`--together` starts all servers at once and lets them take turns, round by round, so that a change of the
machine's speed meets all of them; otherwise one server runs after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from server_process import ServerFailed, ServerProcess, free_port, our_command, our_environment, started
from sglang.bench_serving import benchmark
from sglang.benchmark_metadata.report import environment
from sglang.benchmark_serving.arguments import parse_args
from sglang.benchmark_serving.endpoints import BACKENDS, Result

DEFAULT_CASES = ("600x1", "600x8", "600x32", "7000x1", "7000x8", "3000x32")
SPECULATION = ["--speculative-algorithm", "NEXTN", "--speculative-num-steps"]
FIGURES = {  # the round's own name of each, and how the table and the plot call it
    "output_throughput": "tokens/s",
    "mean_ttft_ms": "TTFT ms",
    "mean_tpot_ms": "TPOT ms",
}


@dataclass(frozen=True)
class Case:
    """Prompts of one length, so many at a time."""

    input_len: int
    concurrency: int

    @classmethod
    def parse(cls, text: str) -> Case:
        length, _, concurrency = text.partition("x")
        if not (length.isdigit() and concurrency.isdigit() and int(length) > 0 and int(concurrency) > 0):
            raise argparse.ArgumentTypeError(f"a case is LENxN, as in 600x8, got {text!r}")
        return cls(int(length), int(concurrency))

    def __str__(self) -> str:
        return f"{self.input_len}x{self.concurrency}"


@dataclass(frozen=True)
class Candidate:
    """A server to start: a command line with {port} in it, and what kind of requests it takes."""

    name: str
    command: str
    backend: str = "sglang"
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Row:
    """One server in one case: the median over rounds."""

    server: str
    case: str
    rounds: list[dict[str, float | None]]
    failed: int  # requests
    accept_length: float | None  # where the server counts verifications; 1 without speculation

    def figure(self, name: str) -> float | None:
        values = [r[name] for r in self.rounds if r[name] is not None]
        return statistics.median(values) if values else None


def candidates(args: argparse.Namespace) -> list[Candidate]:
    """In the order of the command line. Raises ValueError where one is not usable."""
    found = []
    for kind, values in args.servers or []:
        if kind == "ours":
            name, flags = values if len(values) == 2 else (values[0], "")
            speculation = [*SPECULATION, str(args.steps)] if args.steps else []
            ours = our_command(
                args.model_path, args.device, "{port}", [*speculation, *args.our_flags, *shlex.split(flags)]
            )
            found.append(Candidate(name, shlex.join(ours), env=our_environment(precompute=True)))
            continue
        if len(values) not in (2, 3):
            raise ValueError(f"--server takes NAME COMMAND [BACKEND], got {values}")
        if "{port}" not in values[1]:
            raise ValueError(f"--server {values[0]}: its command must hold {{port}}, got {values[1]!r}")
        if len(values) == 3 and values[2] not in BACKENDS:
            raise ValueError(
                f"--server {values[0]}: BACKEND must be one of {list(BACKENDS)}, got {values[2]!r}"
            )
        found.append(Candidate(*values))
    names = [c.name for c in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"at least one server, each with a name of its own, got {names}")
    return found


def one_round(
    url: str, candidate: Candidate, case: Case, seed: int, args: argparse.Namespace
) -> tuple[dict[str, Any], list[Result]]:
    flags = [
        "--backend",
        candidate.backend,
        "--base-url",
        url,
        "--dataset-name",
        "random-ids",
        "--disable-tqdm",
    ]
    flags += ["--random-input-len", str(case.input_len), "--random-output-len", str(args.output_len)]
    flags += ["--random-range-ratio", "1", "--num-prompts", str(max(args.min_prompts, case.concurrency))]
    flags += ["--max-concurrency", str(case.concurrency), "--tokenizer", args.tokenizer or args.model_path]
    flags += ["--warmup-requests", "0", "--seed", str(seed)]
    return asyncio.run(benchmark(parse_args(flags, "")))


def measure_case(servers: list[tuple[Candidate, str]], case: Case, args: argparse.Namespace) -> list[Row]:
    """All rounds of a case, the servers by turns."""
    rows = {c.name: Row(c.name, str(case), [], 0, None) for c, _ in servers}
    tokens, verifications = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0)
    for number in range(1 + args.rounds):
        seed = 1_000_000 * case.concurrency + 1000 * case.input_len + number
        for candidate, url in servers:
            summary, results = one_round(url, candidate, case, seed, args)
            row = rows[candidate.name]
            for error in [r.error for r in results if r.error][:1]:
                print(f"{candidate.name}, {case}: {error}", file=sys.stderr)
            row.failed += summary["failed"]
            if number == 0 or not summary["completed"]:
                continue
            row.rounds.append({name: summary[name] for name in FIGURES})
            if all(r.verifications is not None for r in results):
                # The first token of an answer is the prefill's own.
                tokens[row.server] += sum(r.completion_tokens - 1 for r in results)
                verifications[row.server] += sum(r.verifications for r in results)
    for row in rows.values():
        if verifications[row.server]:
            row.accept_length = tokens[row.server] / verifications[row.server]
    return list(rows.values())


def measure(chosen: list[Candidate], args: argparse.Namespace, rows: list[Row]) -> None:
    """Appends to `rows` case by case, so that who is interrupted keeps what was measured."""
    for group in [chosen] if args.together else [[candidate] for candidate in chosen]:
        with ExitStack() as stack:
            coming = [(candidate, start(candidate, stack, args)) for candidate in group]
            servers = [(c, server.url) for c, server in coming if is_ready(c, server, args)]
            for case in args.cases if servers else ():
                for row in measure_case(servers, case, args):
                    rows.append(row)
                    print_row(row)


def start(candidate: Candidate, stack: ExitStack, args: argparse.Namespace) -> ServerProcess:
    port = free_port()
    command = candidate.command.replace("{port}", str(port))
    log = args.logs / f"{candidate.name.replace('/', '_')}.log"
    return stack.enter_context(started(command, port, candidate.env, log))


def is_ready(candidate: Candidate, server: ServerProcess, args: argparse.Namespace) -> bool:
    """Waits for it; says why it did not start."""
    try:
        server.wait_ready(args.start_timeout)
    except ServerFailed as error:
        print(f"{candidate.name}: {error}", file=sys.stderr)
        return False
    return True


def text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_row(row: Row) -> None:
    rounds = " ".join(text(r["output_throughput"], 0) for r in row.rounds)
    print(
        f"{row.case:>9} {row.server:<24} {text(row.figure('output_throughput'), 1):>9} "
        f"{text(row.figure('mean_ttft_ms'), 1):>9} {text(row.figure('mean_tpot_ms'), 2):>8} "
        f"{text(row.accept_length, 2):>7} {row.failed:>6}  {rounds}",
        flush=True,
    )


def table(rows: list[Row], names: list[str], cases: list[Case]) -> str:
    """A Markdown table: a row a case, a column a server."""
    lines = ["| prompt x at once | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    found = {(row.case, row.server): row for row in rows}
    for case in map(str, cases):
        cells = []
        for name in names:
            row = found.get((case, name))
            figures = [text(row and row.figure(f), d) for f, d in zip(FIGURES, (0, 0, 2))]
            cells.append(", ".join(figures))
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[Row], names: list[str], cases: list[Case], title: str, path: Path) -> None:
    """One picture: a panel a figure, a group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(FIGURES), figsize=(5 * len(FIGURES), 4.2), layout="constrained")
    found = {(row.case, row.server): row for row in rows}
    for axes, (key, label) in zip(panels, FIGURES.items()):
        for i, name in enumerate(names):
            of_name = [found.get((str(case), name)) for case in cases]
            heights = [(row and row.figure(key)) or 0 for row in of_name]
            at = [x + (i - (len(names) - 1) / 2) * 0.8 / len(names) for x in range(len(cases))]
            axes.bar(at, heights, 0.8 / len(names), label=name)
        axes.set_xticks(range(len(cases)), list(map(str, cases)), rotation=30)
        axes.set_title(label, fontsize=10)
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", alpha=0.25)
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


class _InOrder(argparse.Action):
    """Both kinds of servers in one list, in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        namespace.servers = [*(namespace.servers or []), (self.const, values)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-path", required=True, help="what our servers serve; has the tokenizer")
    add("--tokenizer", help="folder of the tokenizer (default: --model-path)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of our servers")
    add("--steps", type=int, default=4, help="speculative steps of our servers; 0: no speculation")
    ordered = {"action": _InOrder, "dest": "servers", "nargs": "+"}
    add(
        "--ours",
        const="ours",
        metavar=("NAME", "FLAGS"),
        **ordered,
        help="this tree's server with these flags",
    )
    add(
        "--server",
        const="other",
        metavar=("NAME", "COMMAND"),
        **ordered,
        help="NAME COMMAND [BACKEND]: any server; {port} in its command stands for the port, BACKEND is "
        "bench_serving's --backend (default: sglang)",
    )
    add("--our-flags", type=shlex.split, default=[], help="flags of all --ours")
    add("--cases", type=Case.parse, nargs="+", default=list(map(Case.parse, DEFAULT_CASES)), metavar="LENxN")
    add("--output-len", type=int, default=128, help="tokens of each answer")
    add("--min-prompts", type=int, default=4, help="prompts of a round, at least")
    add("--rounds", type=int, default=3, help="counted, after one that is not")
    add("--together", action="store_true", help="all servers at once, by turns")
    add("--start-timeout", type=float, default=600.0, help="seconds for a server to answer")
    add("--logs", type=Path, help="folder for the servers' output (default: a new temporary one)")
    add("--json", type=Path, help="write the results here")
    add("--plot", type=Path, help="write the picture (PNG) here")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where a server did not start or a request failed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        chosen = candidates(args)
    except ValueError as error:
        parser.error(str(error))
    args.logs = args.logs or Path(tempfile.mkdtemp(prefix="compare_servers_"))
    args.logs.mkdir(parents=True, exist_ok=True)
    names = [c.name for c in chosen]
    machine = environment(torch.device(args.device))
    print(f"answers of {args.output_len} tokens; the servers' output is in {args.logs}")
    print(
        f"{'case':>9} {'server':<24} {'tokens/s':>9} {'TTFT ms':>9} {'TPOT ms':>8} {'accept':>7} "
        f"{'failed':>6}  rounds"
    )
    rows: list[Row] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the servers end, too
    try:
        measure(chosen, args, rows)
    except (KeyboardInterrupt, SystemExit) as reason:
        print(f"interrupted: {reason!r}", file=sys.stderr)
    print("\noutput tokens/s, TTFT ms, TPOT ms\n" + table(rows, names, args.cases))
    if args.json:
        servers = [asdict(c) | {"env": {}} for c in chosen]
        run = {
            name: getattr(args, name) for name in ("output_len", "min_prompts", "rounds", "together", "steps")
        }
        result = {
            "machine": machine,
            "run": run,
            "servers": servers,
            "results": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if args.plot and rows:
        plot(rows, names, args.cases, f"{machine['device']}, {machine['date']}", args.plot)
    complete = len(rows) == len(names) * len(args.cases) and all(r.rounds and not r.failed for r in rows)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
