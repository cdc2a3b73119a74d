"""One mini-sglang LLM in a process of its own: `minisgl_llm.py PART MODEL CASE OUT`, for minisgl_check.py.

The mode is that of MINISGL_USE_FUSED_COPY. The result is written to OUT as JSON.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = (1, 8, 64, 256)
# What LLM is given in each case whose tokens are compared.
CASES = {
    "fa": {"attention_backend": "fa"},
    "fa, page 16": {"attention_backend": "fa", "page_size": 16},
    "fa prefill, FlashInfer decode": {"attention_backend": "fa,fi"},
    "fa, few slots": {"attention_backend": "fa", "max_running_req": 24, "num_page_override": 12000},
}
COMMON = {
    "use_dummy_weight": True,
    "max_seq_len_override": 2048,
    "cuda_graph_bs": [1, 2, 4, 8, 16, 32, 64],
    "num_page_override": 131072,
    "max_running_req": 64,
}


def start_llm(model: str, **arguments: object) -> Any:
    from sglang_nsa.minisgl import install

    mode = install()
    from minisgl.engine.config import EngineConfig
    from minisgl.llm import LLM

    port = 20000 + os.getpid() % 20000  # its own is one for all offline engines of a machine
    EngineConfig.distributed_addr = property(lambda self: f"tcp://127.0.0.1:{port}")

    if arguments.get("page_size", 1) > 1:
        arguments["num_page_override"] = arguments.get("num_page_override", 131072) // arguments["page_size"]
    llm = LLM(model, **arguments)
    print(f"mode {mode.value}, {type(llm.engine.attn_backend).__name__}", flush=True)
    return llm


def measure_tokens(model: str, case: str, out: str) -> None:
    """300 requests of all lengths; half share a prefix, and the answers end at different steps."""
    from minisgl.core import SamplingParams

    llm = start_llm(model, **(COMMON | CASES[case]))
    rng = random.Random(0)
    shared = [rng.randrange(3, 500) for _ in range(90)]
    prompts, params = [], []
    for number in range(300):
        own = [rng.randrange(3, 500) for _ in range(rng.randrange(2, 200))]
        prompts.append(shared + own if number % 2 else own)
        params.append(
            SamplingParams(temperature=0.0, ignore_eos=number % 3 > 0, max_tokens=rng.randrange(2, 90))
        )
    rounds = []
    for _ in range(2):  # the second round finds prefixes in the cache
        started = time.monotonic()
        answers = [answer["token_ids"] for answer in llm.generate(prompts, params)]
        rounds.append(answers)
        print(f"{sum(map(len, answers))} tokens in {time.monotonic() - started:.1f} s", flush=True)
    Path(out).write_text(json.dumps(rounds))


def decode_batch(llm: Any, bs: int, length: int) -> Any:
    """A padded decode batch of mini-sglang's own, prepared by it, with its input ids."""
    import torch
    from minisgl.core import Batch, Req, SamplingParams

    reqs = [
        Req(
            input_ids=torch.zeros(length - i % 7, dtype=torch.int32),
            table_idx=i,
            cached_len=length - i % 7 - 1,
            output_len=8,
            uid=i,
            sampling_params=SamplingParams(),
            cache_handle=None,
        )
        for i in range(bs)
    ]
    batch = Batch(reqs=reqs, phase="decode")
    prepared = llm._prepare_batch(batch)
    batch.input_ids = llm.token_pool[prepared.input_tuple]
    return batch


def measure_copies(model: str, case: str, out: str) -> None:
    """Host time of what comes before the graph's launch in `GraphRunner.replay`, one LLM, methods by
    turns."""
    import torch
    from sglang_nsa.minisgl.fused_replay import FusedReplay
    from sglang_nsa.minisgl.hooks import find_buffers

    own = {"attention_backend": "fa", "cuda_graph_bs": list(SIZES), "max_running_req": 256}
    llm = start_llm(model, **(COMMON | own | {"max_seq_len_override": 8192}))
    runner = llm.engine.graph_runner
    buffers = find_buffers(runner)
    fused = FusedReplay(buffers)
    rows = []
    with torch.inference_mode(), torch.cuda.stream(llm.engine.stream):
        for bs in SIZES:
            for length in (500, 4000):
                batch = decode_batch(llm, bs, length)
                torch.cuda.synchronize()
                methods = copy_methods(runner, buffers, batch)
                methods["fused"] = lambda batch=batch: fused(batch)
                rows += compare_methods(methods, bs, length)
    Path(out).write_text(json.dumps(rows))


def copy_methods(runner: Any, buffers: Any, batch: Any) -> dict[str, Callable[[], None]]:
    """mini-sglang's own copies, and the same pairs in one torch call with the views held that can be."""
    import torch

    take, table = buffers.sources(), buffers.tensor(buffers.fields[-1])
    bs = batch.padded_size
    held = [buffers.tensor(field)[: bs + field.extra] for field in buffers.fields[:-1]]

    def six() -> None:
        runner.buffer.copy_from(batch)
        runner.attn_backend.prepare_for_replay(batch)

    def foreach() -> None:
        sources = take(batch)
        torch._foreach_copy_([*held, table[:bs, : sources[-1].shape[1]]], sources)

    return {"six copy_": six, "_foreach_copy_": foreach}


def compare_methods(methods: dict[str, Callable[[], None]], bs: int, length: int) -> list[dict]:
    import torch

    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(320):
        for name, run in methods.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            spent = time.perf_counter() - started
            if turn >= 20:
                times[name].append(spent * 1e6)
    return [
        {"bs": bs, "length": length, "method": name, "host_us": statistics.median(times[name]),
         "launches": count_calls(run)}
        for name, run in methods.items()
    ]  # fmt: skip


ENQUEUES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch")


def count_calls(run: Callable[[], object]) -> int:
    """Calls that enqueue work on the device."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return sum(event.name.startswith(ENQUEUES) for event in profiled.events())


class Watch:
    """Host time of some of a scheduler's methods, for full decode batches alone."""

    def __init__(self, llm: Any, bs: int) -> None:
        self.bs, self.spent, self.starts = bs, {}, []
        self._restore = []
        for owner, name in (
            (llm, "_schedule_next_batch"),
            (llm, "_prepare_batch"),
            (llm, "_forward"),
            (llm.engine.graph_runner, "replay"),
        ):
            self._wrap(owner, name)

    def _wrap(self, owner: Any, name: str) -> None:
        method, times = getattr(owner, name), self.spent.setdefault(name, [])

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            result = method(*args)
            spent = time.perf_counter() - started
            given = args[0] if args else result  # a batch, a ForwardInput, or what was scheduled
            batch = getattr(given, "batch", given)
            if getattr(batch, "phase", "") == "decode" and batch.size == self.bs:
                times.append(spent * 1e6)
                if name == "_forward":
                    self.starts.append(started * 1e6)
            return result

        setattr(owner, name, timed)
        self._restore.append((owner, name))

    def stop(self) -> None:
        for owner, name in self._restore:
            delattr(owner, name)

    def medians(self) -> dict[str, float]:
        steps = [b - a for a, b in zip(self.starts, self.starts[1:])]
        return {name: statistics.median(times) for name, times in self.spent.items()} | {
            "step": statistics.median(steps)
        }


def measure_steps(model: str, case: str, out: str) -> None:
    """Whole decode steps of full batches."""
    from minisgl.core import SamplingParams

    arguments = {"attention_backend": case, "cuda_graph_bs": list(SIZES), "max_running_req": 256}
    llm = start_llm(model, **(COMMON | arguments))
    rng, rows = random.Random(1), []
    for bs in SIZES:
        prompts = [[rng.randrange(3, 500) for _ in range(64)] for _ in range(bs)]

        def generate(tokens: int, prompts: list = prompts) -> None:
            llm.generate(prompts, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens))

        generate(8)
        calls = (count_calls(lambda: generate(36)) - count_calls(lambda: generate(20))) / 16
        watch = Watch(llm, bs)
        for _ in range(3):
            generate(100)
        watch.stop()
        rows.append({"bs": bs, "enqueues_per_step": calls, **watch.medians()})
        print(rows[-1], flush=True)
    Path(out).write_text(json.dumps(rows))


PARTS = {"tokens": measure_tokens, "copies": measure_copies, "steps": measure_steps}


if __name__ == "__main__":
    part, model, case, out = sys.argv[1:]
    PARTS[part](model, case, out)
