"""mini-sglang on a GPU in the modes of MINISGL_USE_FUSED_COPY: equal tokens, launches, host time, step time.

    python plugin/tests/gpu/minisgl_check.py PART... --out FOLDER

Parts: inputs, tokens, tokens-overlapping, copies, steps, enqueues, servers, servers-tp2, tokens-and-servers.

Needs mini-sglang's `python/` folder, the plugin's wheel unpacked and minisgl_stand_in/ on PYTHONPATH. MODEL
is a folder with a tokenizer and a config; weights are random. Each LLM and server is a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minisgl_answers import CASES, TOKEN_CASES
from minisgl_times import SIZES, TOLD

RUNS = ("0", "1", "in_graph", "0 again")  # modes; the last shows what varies by itself
VARIABLE = "MINISGL_USE_FUSED_COPY"


def make_model(source: Path, target: Path, **changes: object) -> Path:
    """The model's folder with another config."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name != "config.json":
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


class Check:
    def __init__(self, model: Path, out: Path, runs: Sequence[str]) -> None:
        self.out, self.runs, self.failed = out, runs, []
        self.model = make_model(model, out / "model", vocab_size=512)
        self.large = model
        self.lines: list[str] = []
        self.gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def child(self, kind: str, mode: str, case: str, model: Path, name: str, gpu: int = 0) -> Any | None:
        """The child's result; None where it failed, with the end of its log."""
        result, log = self.out / f"{name}.json", self.out / f"{name}.log"
        arguments = {"args": self.command(kind, model, case, result), "env": self.environment(mode, gpu)}
        with log.open("w") as output:
            try:
                done = subprocess.run(**arguments, stdout=output, stderr=subprocess.STDOUT, timeout=150)
                code = done.returncode
            except subprocess.TimeoutExpired:
                code = "timeout"
        if code != 0 or not result.exists():
            self.failed.append(name)
            self.say(f"{name}: FAILED ({code})")
            print("\n".join(log.read_text(errors="replace").splitlines()[-12:]), flush=True)
            return None
        return json.loads(result.read_text())

    def command(self, kind: str, model: Path, case: str, result: Path) -> list[str]:
        script = Path(__file__).with_name(
            "minisgl_times.py" if kind in ("copies", "steps") else "minisgl_answers.py"
        )
        return [sys.executable, str(script), kind, str(model), case, str(result)]

    def environment(self, mode: str, gpu: int) -> dict[str, str]:
        return os.environ | {VARIABLE: mode, "CUDA_VISIBLE_DEVICES": self.gpus[gpu % len(self.gpus)]}

    def inputs(self) -> None:
        """What the graphs read, at every replay. Nothing is timed here: several at a time."""
        with ThreadPoolExecutor(8) as pool:
            running = {}
            for number, case in enumerate(CASES):
                for mode in ("1", "in_graph"):
                    arguments = ("inputs", mode, case, self.model, f"inputs_{number}_{mode}", number)
                    running[case, mode] = pool.submit(self.child, *arguments)
            for (case, mode), future in running.items():
                found = future.result()
                if found is None:
                    continue
                wrong = {name: count for name, count in found["different"].items() if count}
                self.say(
                    f"inputs, {case}, {mode}: {found['replays']} replays, {found['rows']} rows: "
                    f"{', '.join(found['different'])}: {wrong or 'no difference'}"
                )
                if wrong:
                    self.failed.append(f"inputs, {case}, {mode}")

    def tokens(self) -> None:
        """On one stream mini-sglang repeats itself, so all modes must. Nothing is timed: many at a time."""
        with ThreadPoolExecutor(16) as pool:
            running = {}
            for number, case in enumerate(TOKEN_CASES):
                for run in self.runs:
                    name = f"tokens_{number}_{run.replace(' ', '_')}"
                    arguments = ("tokens", run.split()[0], case, self.model, name, number)
                    running[case, run] = pool.submit(self.child, *arguments)
            for case in TOKEN_CASES:
                self.compare_tokens(case, {run: running[case, run].result() for run in self.runs})

    def tokens_overlapping(self) -> None:
        """One process at a time: another's turn on the GPU would widen mini-sglang's own gaps."""
        results = {}
        for run in self.runs:
            name = f"overlapping_{run.replace(' ', '_')}"
            results[run] = self.child("tokens-overlapping", run.split()[0], "fa", self.model, name)
            self.compare_tokens("fa", {"0": results.get("0"), run: results[run]})

    def compare_tokens(self, case: str, results: dict[str, Any]) -> None:
        for schedule in results.get("0") or ():
            title = f"tokens, {case}, {schedule}"
            answers = {run: found and found[schedule]["answers"] for run, found in results.items()}
            foreign = {run: found and found[schedule]["foreign"] for run, found in results.items()}
            self.compare(title, answers, exact=schedule != "overlapping")
            self.say(f"{title}: prompt tokens that another request wrote: {foreign}")

    def compare(self, title: str, results: dict[str, list[Any] | None], exact: bool) -> None:
        """Every mode against mode 0, request by request."""
        own = results.get("0")
        for mode, found in results.items():
            if mode == "0" or own is None or found is None:
                continue
            equal = sum(a == b for a, b in zip(own, found, strict=True))
            distinct = len(set(map(str, own)))
            self.say(f"{title}: {mode} equals 0 in {equal} of {len(own)} ({distinct} distinct answers)")
            if exact and equal < len(own):
                self.failed.append(f"{title}, {mode}")

    def copies(self) -> None:
        rows = self.child("copies", "0", "", self.large, "copies")
        for row in rows or ():
            self.say(
                f"copies bs {row['bs']:>3} length {row['length']:>4} {row['method']:<15}"
                f"{row['launches']:>3} launches {row['host_us']:8.2f} us"
            )

    def steps(self) -> None:
        """Modes by turns: 0 and 1 in one LLM, in_graph in another; those that have no turn wait."""
        rows = []
        with self.stepping() as llms:
            for bs in SIZES:
                for backend, owners in llms.items():
                    rows += self.measure_turns(owners, backend, bs)
        (self.out / "steps.json").write_text(json.dumps(rows, indent=1) + "\n")

    def measure_turns(self, owners: dict[str, SteppingLLM], backend: str, bs: int) -> list[dict[str, Any]]:
        turns = [{mode: llm.ask("turn", mode, bs) for mode, llm in owners.items()} for _ in range(5)]
        rows = []
        for mode in owners:
            own = [turn[mode] for turn in turns[1:]]  # the first warms up
            times = {name.strip("_"): statistics.median(spent[name] for spent in own) for name in own[0]}
            rows.append({"backend": backend, "mode": mode, "bs": bs, **times})
            spent = ", ".join(f"{name} {time:7.1f}" for name, time in times.items())
            self.say(f"steps {backend:<5} bs {bs:>3} mode {mode:<8}: {spent} us")
        return rows

    def enqueues(self) -> None:
        with self.stepping() as llms:
            for backend, owners in llms.items():
                for bs in SIZES:
                    counts = {mode: llm.ask("enqueues", mode, bs) for mode, llm in owners.items()}
                    self.say(f"enqueues {backend:<5} bs {bs:>3}: {counts}")

    @contextlib.contextmanager
    def stepping(self) -> Iterator[dict[str, dict[str, SteppingLLM]]]:
        """For each decode backend, by mode: LLMs that are ready."""
        with contextlib.ExitStack() as stack:
            llms = {}
            for backend in ("fa", "fa,fi"):
                one, in_graph = (SteppingLLM(self, mode, backend) for mode in ("1", "in_graph"))
                stack.callback(one.end)
                stack.callback(in_graph.end)
                llms[backend] = {"0": one, "1": one, "in_graph": in_graph}
            for owners in llms.values():
                owners["1"].answer(), owners["in_graph"].answer()
            yield llms

    def servers(self, tp: int = 1) -> None:
        # With one rank each all at once; ranks compare their free memory when they start.
        with ThreadPoolExecutor(len(self.runs) if tp == 1 else 1) as pool:
            results = dict(zip(self.runs, pool.map(lambda run: self.serve(run, tp), self.runs)))
        self.compare(f"server, tp {tp}, one after the other", results, exact=True)

    def tokens_and_servers(self) -> None:
        """Both at once, to save time."""
        with ThreadPoolExecutor(2) as pool:
            for part in (pool.submit(self.tokens), pool.submit(self.servers)):
                part.result()

    def serve(self, run: str, tp: int) -> list[str] | None:
        """One server's answers to one request after the other."""
        name = f"server_tp{tp}_{run.replace(' ', '_')}"
        log = self.out / f"{name}.log"
        url = f"http://127.0.0.1:{21000 + 100 * tp + 10 * RUNS.index(run)}"
        try:
            with server(self.model, run.split()[0], tp, url, log):
                if tp > 1:
                    time.sleep(2)  # a rank that connected before rank 0 was there hears nothing at first
                answers = [ask(url, number) for number in range(300)]
        except Exception as error:
            self.failed.append(name)
            self.say(f"{name}: FAILED {error!r}")
            print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), flush=True)
            return None
        (self.out / f"{name}.json").write_text(json.dumps(answers))
        print(f"{name}: {len(answers)} answers", flush=True)
        return answers


class SteppingLLM:
    """A process of minisgl_times.py that measures when it is asked."""

    def __init__(self, check: Check, mode: str, backend: str) -> None:
        name = f"steps_{backend.replace(',', '_')}_{mode}"
        self.log = (check.out / f"{name}.log").open("w+")
        self.process = subprocess.Popen(
            check.command("steps", check.large, backend, Path(os.devnull)),
            env=check.environment(mode, 0),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ask(self, *words: object) -> Any:
        print(*words, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        for line in self.process.stdout:
            if line.startswith(TOLD):
                return json.loads(line.removeprefix(TOLD))
            self.log.write(line)
        raise RuntimeError(f"the LLM ended with {self.process.wait()}: see {self.log.name}")

    def end(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextlib.contextmanager
def server(model: Path, mode: str, tp: int, url: str, log: Path) -> Iterator[None]:
    """mini-sglang's own, ours in front, without overlapping: so it repeats itself."""
    command = [
        sys.executable, "-m", "sglang_nsa.minisgl", "--model", str(model), "--attn", "fa", "--dummy-weight",
        "--port", url.rpartition(":")[2], "--max-seq-len-override", "2048", "--num-pages", "20480",
        "--graph", "64", "--max-running-requests", "64", "--tp-size", str(tp),
        *(["--disable-pynccl"] if tp > 1 else []),
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | {VARIABLE: mode, "MINISGL_DISABLE_OVERLAP_SCHEDULING": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(url, process)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


def wait_until_ready(url: str, process: subprocess.Popen) -> None:
    for _ in range(240):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/v1/models", timeout=2).read()
            return
        time.sleep(0.5)
    raise RuntimeError("the server did not start")


def ask(url: str, number: int) -> str:
    rng = random.Random(number)
    words = ["def", "import", "self", "return", "for", "in", "range", "print", "value", "index"]
    prompt = " ".join(rng.choice(words) for _ in range(rng.randrange(2, 60)))
    body = {"prompt": prompt, "max_tokens": rng.randrange(4, 40), "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=60).read().decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts",
        nargs="+",
        choices=(
            "inputs",
            "tokens",
            "tokens-overlapping",
            "copies",
            "steps",
            "enqueues",
            "servers",
            "servers-tp2",
            "tokens-and-servers",
        ),
    )
    parser.add_argument("--model", type=Path, default=os.environ.get("MODEL"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="of tokens and servers")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options.model, options.out, options.runs)
    parts = {
        "inputs": check.inputs,
        "tokens": check.tokens,
        "tokens-overlapping": check.tokens_overlapping,
        "copies": check.copies,
        "steps": check.steps,
        "enqueues": check.enqueues,
        "servers": check.servers,
        "tokens-and-servers": check.tokens_and_servers,
        "servers-tp2": lambda: check.servers(2),
    }
    for part in options.parts:
        started = time.monotonic()
        parts[part]()
        print(f"== {part}: {time.monotonic() - started:.0f} s", flush=True)
        (options.out / "minisgl_check.txt").write_text("\n".join(check.lines) + "\n")
    print(f"FAILED: {', '.join(check.failed)}" if check.failed else "all parts passed", flush=True)
    return bool(check.failed)


if __name__ == "__main__":
    sys.exit(main())
