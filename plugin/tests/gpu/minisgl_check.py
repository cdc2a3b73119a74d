"""mini-sglang on a GPU in the modes of MINISGL_USE_FUSED_COPY: equal tokens, launches, host time, step time.

    python plugin/tests/gpu/minisgl_check.py PART... --out FOLDER

Parts: inputs, tokens, copies, steps, steps-fi, servers, servers-tp2, tokens-and-servers.

Needs mini-sglang's `python/` folder, the plugin's wheel unpacked and minisgl_stand_in/ on PYTHONPATH. MODEL
is a folder with a tokenizer and a config; weights are random. Each LLM and server is a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minisgl_llm import CASES

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
    def __init__(self, model: Path, out: Path) -> None:
        self.out, self.failed = out, []
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
        script = str(Path(__file__).with_name("minisgl_llm.py"))
        command = [sys.executable, script, kind, str(model), case, str(result)]
        env = os.environ | {VARIABLE: mode, "CUDA_VISIBLE_DEVICES": self.gpus[gpu % len(self.gpus)]}
        with log.open("w") as output:
            try:
                done = subprocess.run(command, env=env, stdout=output, stderr=subprocess.STDOUT, timeout=150)
                code = done.returncode
            except subprocess.TimeoutExpired:
                code = "timeout"
        if code != 0 or not result.exists():
            self.failed.append(name)
            self.say(f"{name}: FAILED ({code})")
            print("\n".join(log.read_text(errors="replace").splitlines()[-12:]), flush=True)
            return None
        return json.loads(result.read_text())

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
        """mini-sglang's answers vary from run to run, so beside the modes stands mode 0 again."""
        with ThreadPoolExecutor(8) as pool:
            running = {}
            for number, case in enumerate(CASES):
                for run in RUNS:
                    name = f"tokens_{number}_{run.replace(' ', '_')}"
                    arguments = ("tokens", run.split()[0], case, self.model, name, number)
                    running[case, run] = pool.submit(self.child, *arguments)
            for case in CASES:
                results = {run: running[case, run].result() for run in RUNS}
                self.compare(f"tokens, {case}", results)

    def compare(self, title: str, results: dict[str, Any]) -> None:
        """Every mode against mode 0, request by request."""
        own = results["0"]
        for mode, found in results.items():
            if mode == "0" or own is None or found is None:
                continue
            pairs = [(a, b) for x, y in zip(own, found, strict=True) for a, b in zip(x, y, strict=True)]
            equal = sum(a == b for a, b in pairs)
            distinct = len({tuple(a) if isinstance(a, list) else a for a, _ in pairs})
            self.say(f"{title}: {mode} equals 0 in {equal} of {len(pairs)} ({distinct} distinct answers)")

    def copies(self) -> None:
        rows = self.child("copies", "0", "", self.large, "copies")
        for row in rows or ():
            self.say(
                f"copies bs {row['bs']:>3} length {row['length']:>4} {row['method']:<15}"
                f"{row['launches']:>3} launches {row['host_us']:8.2f} us"
            )

    def steps(self, backend: str = "fa") -> None:
        short = backend.replace(",", "_")
        for mode in ("1", "in_graph"):
            rows = self.child("steps", mode, backend, self.large, f"steps_{short}_{mode}")
            for row in rows or ():
                self.say(
                    f"steps {backend:<5} mode {row['mode']:<8} bs {row['bs']:>3}: "
                    f"enqueues {row['enqueues_per_step']:5.1f}, "
                    f"prepare {row['_prepare_batch']:7.1f}, replay {row['replay']:7.1f}, "
                    f"forward {row['_forward']:7.1f}, step {row['step']:8.1f} us"
                )

    def servers(self, tp: int = 1) -> None:
        # With one rank each all at once; ranks compare their free memory when they start.
        with ThreadPoolExecutor(len(RUNS) if tp == 1 else 1) as pool:
            results = dict(zip(RUNS, pool.map(lambda run: self.serve(run, tp), RUNS)))
        for part, title in enumerate(("one after the other", "240 at once")):
            found = {m: r and [r[part]] for m, r in results.items()}
            self.compare(f"server, tp {tp}, {title}", found)

    def tokens_and_servers(self) -> None:
        """Both at once, to save time."""
        with ThreadPoolExecutor(2) as pool:
            for part in (pool.submit(self.tokens), pool.submit(self.servers)):
                part.result()

    def serve(self, run: str, tp: int) -> list[list[str]] | None:
        name = f"server_tp{tp}_{run.replace(' ', '_')}"
        port = 21000 + 100 * tp + 10 * RUNS.index(run)
        try:
            with server(self.model, run.split()[0], tp, port, self.out / f"{name}.log") as url:
                return [ask_in_turn(url, 60), ask_together(url, 240)]
        except Exception as error:
            self.failed.append(name)
            self.say(f"{name}: FAILED {error!r}")
            log = (self.out / f"{name}.log").read_text(errors="replace").splitlines()
            print("\n".join(log[-15:]), flush=True)
            return None


@contextlib.contextmanager
def server(model: Path, mode: str, tp: int, port: int, log: Path) -> Iterator[str]:
    command = [
        sys.executable, "-m", "sglang_nsa.minisgl", "--model", str(model), "--attn", "fa", "--dummy-weight",
        "--port", str(port), "--max-seq-len-override", "2048", "--num-pages", "40960", "--graph", "64",
        "--max-running-requests", "64", "--tp-size", str(tp), "--disable-pynccl",
    ]  # fmt: skip
    if tp == 1:
        command.remove("--disable-pynccl")
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | {VARIABLE: mode},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process)
        yield url
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
    body = {"prompt": prompt, "max_tokens": rng.randrange(4, 60), "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=60).read().decode()


def ask_in_turn(url: str, count: int) -> list[str]:
    return [ask(url, number) for number in range(count)]


def ask_together(url: str, count: int) -> list[str]:
    with ThreadPoolExecutor(48) as pool:
        return list(pool.map(lambda number: ask(url, 1000 + number), range(count)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts",
        nargs="+",
        choices=(
            "inputs",
            "tokens",
            "copies",
            "steps",
            "steps-fi",
            "servers",
            "servers-tp2",
            "tokens-and-servers",
        ),
    )
    parser.add_argument("--model", type=Path, default=os.environ.get("MODEL"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options.model, options.out)
    parts = {
        "inputs": check.inputs,
        "tokens": check.tokens,
        "copies": check.copies,
        "steps": check.steps,
        "steps-fi": lambda: check.steps("fa,fi"),
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
