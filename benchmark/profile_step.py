"""Where the time of a decode step goes: kernels, gaps and the host, of our engine or of a running SGLang.

    python benchmark/profile_step.py --model-path models/tiny-nsa --device cuda --markdown profile.md
    python benchmark/profile_step.py --url http://127.0.0.1:30000 --model-path MODEL --markdown sglang.md

Prompts are distinct random ids. First the step is timed without a profiler (its cost to the host is large),
with the time of each of the host's functions; then torch's profiler records some steps with the device's
activity alone, whose gaps are then nearly true, and a few with the host's operators too.
"""

from __future__ import annotations

import argparse
import cProfile
import glob
import importlib
import json
import pstats
import random
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import step_trace

WARM_STEPS = 20
# Methods of our server that are timed one by one; a later one may lie within an earlier one.
SPANS = (
    ("sglang.srt.managers.scheduler", "Scheduler.step"),
    ("sglang.srt.managers.scheduler", "Scheduler.can_run_ahead"),
    ("sglang.srt.managers.scheduler", "Scheduler.schedule_decode"),
    ("sglang.srt.managers.tp_worker", "TpModelWorker.launch_decode"),
    ("sglang.srt.model_executor.step_runner", "StepRunner.load"),
    ("sglang.srt.model_executor.step_graph", "StepGraph.replay"),
    ("sglang.srt.model_executor.read_back", "ReadBack.start"),
    ("sglang.srt.managers.tp_worker", "PendingDecode.read"),
    ("sglang.srt.managers.scheduler", "Scheduler.process_decode"),
    ("sglang.srt.managers.scheduler", "Scheduler.send_outputs"),
)


class Spans:
    """Times methods by replacing them; one that this version does not have is left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def measured(self) -> Iterator[Spans]:
        originals: list[tuple[type, str, Any]] = []
        for module_name, path in SPANS:
            owner_name, name = path.split(".")
            with suppress(ImportError, AttributeError):
                owner = getattr(importlib.import_module(module_name), owner_name)
                original = owner.__dict__.get(name)
                if original is not None:
                    originals.append((owner, name, original))
                    setattr(owner, name, self._timed(path, original))
        try:
            yield self
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _timed(self, path: str, function: Callable[..., Any]) -> Callable[..., Any]:
        times = self.seconds.setdefault(path, [])

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                times.append(time.perf_counter() - start)

        return call

    def markdown(self, steps: int) -> str:
        lines = [
            "| host function (without a profiler) | a step | us a step | median us |",
            "|---|---|---|---|",
        ]
        for path, times in self.seconds.items():
            if times:
                us = sum(times) / steps * 1e6
                median = statistics.median(times) * 1e6
                lines.append(f"| `{path}` | {len(times) / steps:.1f} | {us:.0f} | {median:.0f} |")
        return "\n".join(lines) + "\n"


class OwnEngine:
    """Our engine in this process, one step at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        from sglang import Engine
        from sglang.srt.server_args import ServerArgs

        flags = ["--model-path", args.model_path, "--device", args.device, "--speculative-algorithm", "NEXTN"]
        flags += ["--speculative-num-steps", str(args.steps), *args.server_flags]
        self.engine = Engine(server_args=ServerArgs.from_cli(flags))
        self.vocab_size = self.engine.scheduler.worker.vocab_size
        self.device = args.device

    def profile(self, concurrency: int, args: argparse.Namespace) -> str:
        import torch

        prompts, timed = random_prompts(concurrency, args.prompt_len, self.vocab_size), args.timed_steps
        params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": args.max_new_tokens}
        stream = self.engine.generate(input_ids=prompts, sampling_params=params, stream=True)
        next(stream)
        while len(self.engine.scheduler.running) < concurrency:
            self._steps(1)
        self._steps(WARM_STEPS)
        reqs = list(self.engine.scheduler.running)
        before = [(req.spec_verify_ct, len(req.output_ids)) for req in reqs]
        start = time.perf_counter()
        self._steps(timed)
        step_us = (time.perf_counter() - start) / timed * 1e6
        rounds = [(r.spec_verify_ct - v, len(r.output_ids) - n) for r, (v, n) in zip(reqs, before)]
        accept = sum(n for _, n in rounds) / max(1, sum(v for v, _ in rounds))
        with Spans().measured() as spans:
            self._steps(timed)
        sections = [
            f"step {step_us:.0f} us (mean of {timed}, no profiler), accept length {accept:.2f}, "
            f"{step_us / accept:.0f} us a token\n",
            spans.markdown(timed),
        ]
        if self.device == "cuda":
            for kind, activities in (
                ("device's activity alone", [torch.profiler.ProfilerActivity.CUDA]),
                (
                    "with the host's operators",
                    [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA],
                ),
            ):
                sections.append(step_trace.markdown(kind, step_trace.analyse(self._trace(activities, args))))
        sections.append(self._functions(timed))
        self.engine.abort_request(abort_all=True)
        stream.close()
        return "\n".join(sections)

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.engine._step()
        if len(self.engine.scheduler.running) == 0:
            raise SystemExit("all requests ended: --max-new-tokens is too small for this accept length")

    def _trace(self, activities: list[Any], args: argparse.Namespace) -> list[step_trace.Event]:
        import torch

        with torch.profiler.profile(activities=activities) as profiler:
            self._steps(args.trace_steps)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return step_trace.read_events(path)

    def _functions(self, steps: int) -> str:
        """The host's functions by their own time, under cProfile, which makes small ones look dear."""
        profiler = cProfile.Profile()
        profiler.runcall(self._steps, steps)
        rows = pstats.Stats(profiler).stats.items()
        ranked = sorted(rows, key=lambda row: -row[1][2])[:25]
        lines = [
            "### Python functions under cProfile",
            "",
            "| function | a step | own us a step |",
            "|---|---|---|",
        ]
        for (file, _, name), (_, calls, own, *_) in ranked:
            where = f"{Path(file).stem}.{name}" if file not in ("~", "") else name.partition(" at 0x")[0]
            lines.append(f"| `{where[:80]}` | {calls / steps:.1f} | {own / steps * 1e6:.1f} |")
        return "\n".join(lines) + "\n"


class RunningSGLang:
    """A server of SGLang's, by its endpoints /generate and /start_profile. It runs on this machine."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.url = args.url
        self.vocab_size = json.loads((Path(args.model_path) / "config.json").read_text())["vocab_size"]

    def profile(self, concurrency: int, args: argparse.Namespace) -> str:
        prompts = random_prompts(concurrency, args.prompt_len, self.vocab_size)
        self._generate(prompts, 16)  # prompts into the cache, kernels compiled
        seconds, accept = self._time_per_token(prompts, args)
        sections = [
            f"{seconds * 1e6:.0f} us a token (no profiler), accept length {accept:.2f}, "
            f"step {seconds * accept * 1e6:.0f} us\n"
        ]
        for kind, activities in (
            ("device's activity alone", ["GPU"]),
            ("with the host's operators", ["CPU", "GPU"]),
        ):
            events = self._trace(prompts, activities, args)
            sections.append(step_trace.markdown(kind, step_trace.analyse(events)))
        return "\n".join(sections)

    def _time_per_token(self, prompts: list[list[int]], args: argparse.Namespace) -> tuple[float, float]:
        """The difference of a short and a long answer, which leaves out the prompt."""
        times, verified, tokens = [], [], []
        for length in (32, 32 + args.timed_tokens):
            start = time.perf_counter()
            answers = self._generate(prompts, length)
            times.append(time.perf_counter() - start)
            meta = [answer["meta_info"] for answer in answers]
            tokens.append(sum(m["completion_tokens"] for m in meta))
            verified.append(sum(m.get("spec_verify_ct") or m["completion_tokens"] for m in meta))
        accept = (tokens[1] - tokens[0]) / max(1, verified[1] - verified[0])
        return (times[1] - times[0]) / args.timed_tokens, accept

    def _trace(
        self, prompts: list[list[int]], activities: list[str], args: argparse.Namespace
    ) -> list[step_trace.Event]:
        with tempfile.TemporaryDirectory() as folder:
            work = threading.Thread(target=self._generate, args=(prompts, args.max_new_tokens))
            work.start()
            time.sleep(0.5)
            body = {"output_dir": folder, "num_steps": args.trace_steps, "activities": activities}
            self._post("/start_profile", body)
            work.join()
            deadline = time.monotonic() + 60
            while not (found := glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)):
                if time.monotonic() > deadline:
                    raise SystemExit(f"{self.url} wrote no trace to {folder}")
                time.sleep(0.5)
            time.sleep(2)  # until it is written to its end
            return step_trace.read_events(Path(found[0]))

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
        params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": new_tokens}
        return json.loads(self._post("/generate", {"input_ids": prompts, "sampling_params": params}))

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.read()


def random_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = random.Random(count)
    return [[generator.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-path", required=True)
    add("--url", help="a running SGLang; without it our own engine runs in this process")
    add("--title", default="step profile")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--steps", type=int, default=4, help="speculative steps")
    add("--concurrency", type=int, nargs="+", default=[1], help="requests at once, one round each")
    add("--prompt-len", type=int, default=600)
    add("--max-new-tokens", type=int, default=2400, help="of each request, so that none ends while measured")
    add("--timed-steps", type=int, default=100, help="of our engine, without a profiler")
    add("--timed-tokens", type=int, default=256, help="with --url: tokens of the timed answer")
    add("--trace-steps", type=int, default=20)
    add("--markdown", type=Path, help="append the tables to this file")
    add("--server-flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to our engine")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    server = RunningSGLang(args) if args.url else OwnEngine(args)
    for concurrency in args.concurrency:
        text = f"## {args.title}, {concurrency} at once, prompts of {args.prompt_len}\n\n"
        text += server.profile(concurrency, args)
        print(text, flush=True)
        if args.markdown:
            with args.markdown.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
