"""Time per output token of whole servers, by metadata path: same prompts, several batch sizes and contexts.

    python benchmark/compare_paths.py --device cpu              # models/tiny-nsa, a small workload
    python benchmark/compare_paths.py --device cuda --model v32 --cases 1024x1 16384x32 --out results

One server for each path, all started together and taking turns, round by round, so that a change of the
machine's speed meets all of them (--one-by-one: one after the other). A case LENxN sends N prompts of LEN
tokens at once. Its first round leaves the prompts in the prefix cache and is not counted: what is compared is
decoding. The answers are compared with those of the first path: in float32 a difference is an error.

--model tiny-nsa: prompts are held-out text, so drafts are accepted as they would be. --model v32: dimensions
of DeepSeek-V3.2 with few layers and random weights; no draft is accepted, so a token takes a whole step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from compare_servers import Candidate, Case, is_ready, start
from questions.question import Table, figure, save, unique
from server_process import ROOT, ServerProcess, our_command, our_environment
from sglang.bench_serving import benchmark
from sglang.benchmark_metadata.report import environment
from sglang.benchmark_serving.arguments import parse_args
from sglang.benchmark_serving.datasets import load_tokenizer

TINY = ROOT / "models" / "tiny-nsa"
ROOM = 512  # tokens of a sequence beyond prompt and answer: drafts, the end of a page
# DeepSeek-V3.2's config.json, but for what makes it large: 61 layers, 256 experts, 129,280 words.
V32_CONFIG = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "max_position_embeddings": 163840,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 32000,
}


@dataclass(frozen=True)
class ServerPath:
    """How a server brings its metadata up to date; without a layout every backend computes its own."""

    layout: str | None = None
    copy: str = "auto"

    @property
    def flags(self) -> list[str]:
        if self.layout is None:
            return []
        return ["--nsa-metadata-layout", self.layout, "--nsa-metadata-copy", self.copy]


PATHS = {
    "flag 0": ServerPath(),
    "replicate, torch": ServerPath("replicate", "torch"),
    "replicate, fused": ServerPath("replicate", "fused"),
    "replicate, direct": ServerPath("replicate", "direct"),
    "shared": ServerPath("shared"),
    "in_graph": ServerPath("in_graph"),
    "indirect": ServerPath("indirect"),
}
COLOURS = ("#444444", "#ef8a62", "#2166ac", "#053061", "#1a9850", "#66bd63", "#b8860b")


@dataclass
class Row:
    """One path in one case."""

    path: str
    prompt: int  # tokens
    requests: int  # at once
    tpot_ms: float  # median over rounds of the mean over requests
    tpot_rounds_ms: list[float]
    ratio: float  # tpot of the first path / this tpot, median over rounds
    accept_length: float | None
    same: float  # share of the answers that equal the first path's
    repeats: float  # share of the answers that equal this server's own of the round before
    tables_mib: float  # page tables that the server keeps
    fallbacks: int


@dataclass
class Answers:
    """What one server said in one case, and how fast."""

    tpot_ms: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    tokens: int = 0  # of all rounds, without the first of each answer, which is the prefill's
    verifications: int = 0
    state: dict[str, Any] = field(default_factory=dict)


def model_folder(args: argparse.Namespace, folder: Path) -> tuple[str, list[str]]:
    """The folder of the model, and the flags that go with it."""
    if args.model != "v32":
        return str(TINY if args.model == "tiny-nsa" else args.model), []
    sys.path.insert(0, str(ROOT))
    from scripts.make_dummy_model import write_config

    return str(write_config(folder / "v32", V32_CONFIG)), ["--load-format", "dummy"]


def write_prompts(model: str, case: Case, file: Path) -> Path:
    """Prompts of exactly that many tokens: held-out text where the model has some, else random ids."""
    held_out, tokenizer = Path(model) / "held_out.jsonl", load_tokenizer(model)
    rng = random.Random(case.input_len)
    if held_out.exists():
        lines = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
        texts = [line["prompt"] + line["continuation"] for line in lines]
        ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        ids *= 1 + -(-case.input_len // len(ids))
        starts = [i * (len(ids) - case.input_len) // case.concurrency for i in range(case.concurrency)]
        prompts = [ids[i : i + case.input_len] for i in starts]
    else:
        words = range(256)  # bytes: no special token among them
        prompts = [rng.choices(words, k=case.input_len) for _ in range(case.concurrency)]
    file.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in prompts), encoding="utf-8")
    return file


def candidates(model: str, flags: Sequence[str], args: argparse.Namespace) -> list[Candidate]:
    """One server for each path, with room for all requests of a case at once: nobody waits."""
    most = max(case.concurrency for case in args.cases)
    longest = max(case.input_len for case in args.cases) + args.output_len + ROOM
    tokens = max(case.concurrency * (case.input_len + args.output_len + ROOM) for case in args.cases)
    common = ["--max-running-requests", most, "--cuda-graph-max-bs", most, "--max-total-tokens", tokens]
    common += ["--context-length", longest, "--log-level", "warning", *flags]
    common += ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", args.steps]
    if args.device == "cuda":
        common += ["--dtype", "bfloat16"]
    common = [*map(str, common), *args.server_flags]
    found = []
    for name in args.paths:
        path = PATHS[name]
        command = our_command(model, args.device, "{port}", [*common, *path.flags])
        found.append(Candidate(name, " ".join(command), env=our_environment(path.layout is not None)))
    return found


async def one_round(url: str, model: str, prompts: Path, case: Case, args: argparse.Namespace) -> Any:
    flags = ["--backend", "sglang", "--base-url", url, "--dataset-name", "custom", "--disable-tqdm"]
    flags += ["--dataset-path", str(prompts), "--random-output-len", str(args.output_len)]
    flags += ["--num-prompts", str(case.concurrency), "--tokenizer", model, "--warmup-requests", "0"]
    return await benchmark(parse_args(flags, ""))


def measure_case(
    servers: Sequence[tuple[Candidate, str]], model: str, case: Case, args: argparse.Namespace, folder: Path
) -> Iterator[Row]:
    """All rounds of a case, the servers by turns."""
    prompts = write_prompts(model, case, folder / f"{case}.jsonl")
    answers = {candidate.name: Answers() for candidate, _ in servers}
    for number in range(1 + args.rounds):
        for candidate, url in servers:
            summary, results = asyncio.run(one_round(url, model, prompts, case, args))
            errors = [result.error for result in results if result.error]
            if errors:
                raise SystemExit(f"{candidate.name}, {case}: {errors[0]}")
            mine = answers[candidate.name]
            mine.before, mine.texts = mine.texts, [result.text for result in results]
            mine.state = summary["server_info"]["internal_states"][0]["nsa_metadata"]
            if number == 0:
                continue
            mine.tpot_ms.append(summary["mean_tpot_ms"])
            mine.tokens += sum(result.completion_tokens - 1 for result in results)
            mine.verifications += sum(result.verifications or 0 for result in results)
    first = next(iter(answers.values()))
    for name, mine in answers.items():
        yield Row(
            path=name,
            prompt=case.input_len,
            requests=case.concurrency,
            tpot_ms=round(statistics.median(mine.tpot_ms), 4),
            tpot_rounds_ms=[round(value, 4) for value in mine.tpot_ms],
            ratio=round(statistics.median(a / b for a, b in zip(first.tpot_ms, mine.tpot_ms)), 4),
            accept_length=mine.tokens / mine.verifications if mine.verifications else None,
            same=equal_share(mine.texts, first.texts),
            repeats=equal_share(mine.texts, mine.before),
            tables_mib=mine.state["page_table_bytes"] / 2**20,
            fallbacks=mine.state["fallbacks"],
        )


def equal_share(texts: Sequence[str], others: Sequence[str]) -> float:
    return sum(map(str.__eq__, texts, others)) / len(texts)


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Every path in every case; where servers run one by one, the cases of one path come together. Written
    after each case, so that nothing is lost where the machine is taken away."""
    model, flags = model_folder(args, folder)
    chosen = candidates(model, flags, args)
    rows: list[Row] = []
    for group in [[candidate] for candidate in chosen] if args.one_by_one else [chosen]:
        with ExitStack() as stack:
            began = time.perf_counter()
            coming = [(candidate, start(candidate, stack, args)) for candidate in group]
            stack.callback(terminate_all, [server for _, server in coming])
            if not all(is_ready(candidate, server, args) for candidate, server in coming):
                raise SystemExit(1)
            print(f"{len(group)} servers ready after {time.perf_counter() - began:.0f} s", flush=True)
            servers = [(candidate, server.url) for candidate, server in coming]
            for case in args.cases:
                for row in measure_case(servers, model, case, args, folder):
                    rows.append(row)
                    print_row(row)
                if args.out is not None:
                    write(result_of(rows, args), args.out)
    return rows


def terminate_all(servers: Sequence[ServerProcess]) -> None:
    """Asked to end at once, before they are waited for one by one."""
    for server in servers:
        server.terminate()


def result_of(rows: Sequence[Row], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON of a run."""
    run = {key: getattr(args, key) for key in ("output_len", "rounds", "steps", "one_by_one")}
    run |= {"model": Path(args.model).name}
    machine = environment(torch.device(args.device)) | {"device_type": args.device}
    return {"machine": machine, "run": run, "rows": [asdict(row) for row in rows]}


HEADER = (
    f"{'prompt':>7} {'at once':>7} {'path':<18} {'TPOT ms':>8} {'ratio':>7} {'accept':>7} "
    f"{'same':>5} {'tables MiB':>10}  rounds"
)


def print_row(row: Row) -> None:
    accept = "-" if row.accept_length is None else f"{row.accept_length:.2f}"
    rounds = " ".join(f"{value:.3f}" for value in row.tpot_rounds_ms)
    print(
        f"{row.prompt:>7} {row.requests:>7} {row.path:<18} {row.tpot_ms:>8.3f} {row.ratio:>6.3f}x "
        f"{accept:>7} {row.same:>5.0%} {row.tables_mib:>10.2f}  {rounds}",
        flush=True,
    )


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Time per output token by path and case; then what else differs, in the last case."""
    rows = [{**row, "case": f"{row['requests']} x {row['prompt']}"} for row in rows]
    cases, paths = unique(rows, "case"), unique(rows, "path")
    found = {(row["path"], row["case"]): row for row in rows}
    lines = []
    for path in paths:
        here = [found[path, case] for case in cases]
        lines.append([path, *(f"{row['tpot_ms']:.3f} ({row['ratio']:.2f}x)" for row in here)])
    rest = [
        [path, *(f"{found[path, cases[-1]][key]:.2f}" if found[path, cases[-1]][key] is not None else None
                 for key in ("accept_length", "tables_mib", "same", "repeats"))]
        for path in paths
    ]  # fmt: skip
    return [
        Table(["ms per output token (speed-up), requests x prompt", *cases], lines),
        Table(
            [f"{cases[-1]}", "accept length", "page tables MiB", "equals the first", "its own before"],
            rest,
        ),
    ]


def plot(rows: Sequence[dict[str, Any]], where: str, path: Path) -> None:
    """Time per output token, and what each path saves of it."""
    drawn, (left, right) = figure("Time per output token of whole servers, by metadata path", where, 2)
    cases = list(dict.fromkeys((row["requests"], row["prompt"]) for row in rows))
    names = unique(rows, "path")
    for i, name in enumerate(names):
        mine = [row for row in rows if row["path"] == name]
        at = [x + (i - (len(names) - 1) / 2) * 0.8 / len(names) for x in range(len(cases))]
        colour = COLOURS[list(PATHS).index(name)]
        left.bar(at, [row["tpot_ms"] for row in mine], 0.8 / len(names), color=colour, label=name)
        for x, row in zip(at, mine):
            left.plot([x] * len(row["tpot_rounds_ms"]), row["tpot_rounds_ms"], "k.", markersize=3)
        right.plot(at, [100 * (1 - 1 / row["ratio"]) for row in mine], "o", color=colour)
    for axes in (left, right):
        axes.set_xticks(range(len(cases)), [f"{n} x {length}" for n, length in cases])
        axes.set_xlabel("requests x tokens of the prompt")
    left.set_ylabel("ms per output token (dots: rounds)")
    right.set_ylabel(f"% saved of {names[0]}'s time")
    left.legend(fontsize=8, frameon=False)
    save(drawn, path)


def write(result: dict[str, Any], folder: Path) -> None:
    """The JSON, and its table and picture beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    name, about = f"server_paths_{result['run']['model']}", result["machine"]
    (folder / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    text = "\n\n".join(map(str, tables(result["rows"])))
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    where = f"{result['run']['model']}, {about['device']}, {about['date'][:10]}, torch {about['torch']}"
    plot(result["rows"], where, folder / f"{name}.png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="tiny-nsa", help="tiny-nsa, v32, or the folder of a model")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--steps", type=int, default=4, help="speculative steps")
    cases = [Case(256, 1), Case(256, 4)]
    add("--cases", type=Case.parse, nargs="+", default=cases, metavar="LENxN", help="tokens x requests")
    add("--output-len", type=int, default=64, help="tokens of each answer")
    add("--rounds", type=int, default=3, help="counted, after one that fills the prefix cache")
    add("--paths", nargs="+", choices=PATHS, default=list(PATHS), metavar="PATH", help="; ".join(PATHS))
    add("--one-by-one", action="store_true", help="one server after the other")
    add("--start-timeout", type=float, default=600.0, help="seconds for a server to answer")
    add("--out", type=Path, help="folder for the JSON, the table and the plot")
    add("--replot", type=Path, metavar="FILE", help="table and plot of an earlier JSON, beside it")
    add("--server-flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the servers")
    return parser


def main() -> int:
    """1 where answers differ that must be equal, or a path fell back to another."""
    args = build_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server outlives this process
    if args.replot is not None:
        write(json.loads(args.replot.read_text(encoding="utf-8")), args.replot.parent)
        return 0
    args.logs = Path(tempfile.mkdtemp(prefix="compare_paths_"))
    print(f"answers of {args.output_len} tokens, {args.steps} speculative steps", end="; ")
    print(f"the servers' output is in {args.logs}\n{HEADER}")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    print("\n" + "\n\n".join(map(str, tables([asdict(row) for row in rows]))))
    different = [row.path for row in rows if row.same < 1 and args.device == "cpu"]
    fallen = [row.path for row in rows if row.fallbacks]
    for what, names in (("answers differ from the first path's", different), ("fell back to torch", fallen)):
        if names:
            print(f"{what}: {sorted(set(names))}", file=sys.stderr)
    return 1 if different or fallen else 0


if __name__ == "__main__":
    sys.exit(main())
