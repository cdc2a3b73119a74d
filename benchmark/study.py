"""Measures what docs/study.md rests on: one question after another, on one device, in one run.

    python benchmark/study.py --device cuda --out docs/results/my-machine
    python benchmark/study.py --device cpu --out OUT --questions copy_methods destinations
    python benchmark/study.py --replot docs/results/my-machine --document docs/study.md

Writes study.json after every question, then the tables as markdown and a plot for each question. Every copy
is checked before it is measured; a question that fails leaves the others be. --replot draws an earlier run's,
--document puts its tables into a text, between the marks `<!-- NAME DEVICE N -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

import torch
from compare_paths import tables as server_tables
from questions import QUESTIONS
from questions.bench import Bench
from questions.question import Question
from sglang.benchmark_metadata.report import environment

MARK = re.compile(r"(<!-- ([\w-]+) (cpu|cuda) (\d+) -->\n).*?(<!-- end -->)", re.DOTALL)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    names = [question.name for question in QUESTIONS]
    add("--questions", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    add("--out", type=Path, default=Path("study"), help="folder for study.json, tables.md and the plots")
    add("--quick", action="store_true", help="the smallest sizes, to see that all of it works")
    add("--replot", type=Path, metavar="DIR", help="tables and plots of DIR/study.json, nothing is measured")
    add("--document", type=Path, metavar="FILE", help="put the tables between the marks of FILE")
    args = parser.parse_args()
    if args.device == "cuda" and args.replot is None and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return args


def measure(args: argparse.Namespace) -> list[str]:
    """Measures the chosen questions, keeping those of an earlier run in the folder; names what failed."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write between the tables
    torch.set_num_threads(1)
    bench = Bench(torch.device(args.device), args.quick)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "study.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    failed = []
    for question in [question for question in QUESTIONS if question.name in args.questions]:
        if question.needs_cuda and not bench.cuda:
            print(f"{question.name}: needs CUDA, left out", flush=True)
            continue
        started = time.perf_counter()
        try:
            rows = question.measure(bench)
        except Exception:
            traceback.print_exc()
            failed.append(question.name)
            continue
        about = environment(bench.device) | {"device_type": args.device}
        results[question.name] = {"machine": about, "rows": rows}
        file.write_text(json.dumps(results, indent=0) + "\n", encoding="utf-8")
        print(f"\n== {question.title} ({time.perf_counter() - started:.1f} s)", flush=True)
        for table in question.tables(rows):
            print(f"{table}\n", flush=True)
    return failed


def draw(folder: Path) -> None:
    """tables.md and the plots of a folder with study.json."""
    results = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    text = []
    for question in measured(results):
        rows, about = results[question.name]["rows"], results[question.name]["machine"]
        question.plot(
            rows,
            f"{about['device']}, {about['date'][:10]}, torch {about['torch']}",
            folder / f"{question.name}.png",
        )
        text += [f"## {question.title}", *map(str, question.tables(rows))]
    (folder / "tables.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print(f"wrote {folder}/tables.md and {len(measured(results))} plots")


def measured(results: dict) -> list[Question]:
    return [question for question in QUESTIONS if question.name in results]


def results_of(folder: Path) -> dict:
    """What was measured into a folder, by compare_paths.py as well."""
    results = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    servers = {
        file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("server_paths_*.json")
    }
    return results | servers


def fill(document: str, results: dict) -> str:
    """The document with the tables of these results made anew."""
    by_name = {question.name: question.tables for question in QUESTIONS}

    def table(match: re.Match[str]) -> str:
        start, name, device, index, end = match.groups()
        found = results.get(name)
        if found is None or found["machine"]["device_type"] != device:
            return match.group(0)
        tables = by_name.get(name, server_tables)  # the others are server_paths_MODEL
        return f"{start}{tables(found['rows'])[int(index)]}\n{end}"

    return MARK.sub(table, document)


def main() -> int:
    args = parse_args()
    import matplotlib

    matplotlib.use("Agg")
    folder = args.replot or args.out
    failed = measure(args) if args.replot is None else []
    draw(folder)
    if args.document is not None:
        results = results_of(folder)
        args.document.write_text(fill(args.document.read_text(encoding="utf-8"), results), encoding="utf-8")
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
