"""Host time and decode steps of one mini-sglang LLM: `minisgl_times.py PART MODEL CASE OUT`.

The mode is that of MINISGL_USE_FUSED_COPY.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minisgl_llm import COMMON, run_part, start_llm

SIZES = (1, 8, 64, 256)


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
    from sglang_nsa.minisgl.in_graph import InGraphReplay

    own = {"attention_backend": "fa", "cuda_graph_bs": list(SIZES), "max_running_req": 256}
    llm = start_llm(model, **(COMMON | own | {"max_seq_len_override": 8192}))
    runner = llm.engine.graph_runner
    buffers = find_buffers(runner)
    fused = FusedReplay(buffers).copy
    in_graph = InGraphReplay(buffers, llm.engine.page_table, page_size=1)
    rows = []
    with torch.inference_mode(), torch.cuda.stream(llm.engine.stream):
        for bs in SIZES:
            for length in (500, 4000):
                batch = decode_batch(llm, bs, length)
                torch.cuda.synchronize()
                methods = copy_methods(runner, buffers, batch)
                methods["fused"] = functools.partial(fused, batch)
                in_graph.pack(batch)
                methods["in_graph"] = functools.partial(in_graph.copy_from, batch)
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
    """Host time of some of a scheduler's methods while it is entered, for full decode batches alone."""

    def __init__(self, llm: Any, bs: int) -> None:
        self.bs, self.spent, self.steps = bs, {}, []
        self._started = 0.0
        self._methods = (
            (llm, "_prepare_batch"),
            (llm, "_forward"),
            (llm.engine.graph_runner, "replay"),
        )

    def __enter__(self) -> Watch:
        self._started = 0.0
        for owner, name in self._methods:
            setattr(owner, name, self._timed(getattr(owner, name), name))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name in self._methods:
            delattr(owner, name)

    def _timed(self, method: Callable, name: str) -> Callable:
        times = self.spent.setdefault(name, [])

        def timed(given: Any) -> Any:
            started = time.perf_counter()
            result = method(given)
            batch = getattr(given, "batch", given)  # a ForwardInput has one, or it is one
            if batch.phase == "decode" and batch.size == self.bs:
                times.append((time.perf_counter() - started) * 1e6)
                if name == "_forward":
                    if self._started:
                        self.steps.append((started - self._started) * 1e6)
                    self._started = started
            return result

        return timed

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in (*self.spent.items(), ("step", self.steps))}


@contextlib.contextmanager
def own_copies(llm: Any) -> Iterator[None]:
    """mini-sglang's own methods again, where MINISGL_USE_FUSED_COPY=1 put others."""
    backend = llm.engine.attn_backend
    decode = getattr(backend, "decode_backend", backend)
    hooked = [
        (owner, name, vars(owner).pop(name))
        for owner, name in ((llm.engine.graph_runner.buffer, "copy_from"), (decode, "prepare_for_replay"))
        if name in vars(owner)
    ]
    yield
    for owner, name, method in hooked:
        setattr(owner, name, method)


TOLD = "result: "  # in front of an answer, on a line of its own


def serve_steps(model: str, case: str, out: str) -> None:
    """Answers each line `WHAT MODE SIZE` on stdin, so that the turns of processes may alternate. MODE: the
    process's own, or 0 in one that was started with 1."""
    arguments = {"attention_backend": case, "cuda_graph_bs": list(SIZES), "max_running_req": 256}
    llm = start_llm(model, **(COMMON | arguments))
    print(f"{TOLD}null", flush=True)
    for line in sys.stdin:
        what, mode, bs = line.split()
        with contextlib.nullcontext() if mode == os.environ["MINISGL_USE_FUSED_COPY"] else own_copies(llm):
            print(f"{TOLD}{json.dumps(STEPS[what](llm, int(bs)))}", flush=True)


def generate(llm: Any, bs: int, tokens: int) -> None:
    """`bs` requests of 64 tokens; as many more."""
    from minisgl.core import SamplingParams

    rng = random.Random(1)
    prompts = [[rng.randrange(3, 500) for _ in range(64)] for _ in range(bs)]
    llm.generate(prompts, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens))


def measure_turn(llm: Any, bs: int) -> dict[str, float]:
    """Medians of some 60 full decode steps, in microseconds."""
    with Watch(llm, bs) as watch:
        generate(llm, bs, 60)
    return watch.medians()


def count_enqueues(llm: Any, bs: int) -> float:
    """Of a decode step. Only when nothing is timed any more: a profiler leaves its traces."""
    return (count_calls(lambda: generate(llm, bs, 20)) - count_calls(lambda: generate(llm, bs, 12))) / 8


STEPS = {"turn": measure_turn, "enqueues": count_enqueues}


if __name__ == "__main__":
    run_part({"copies": measure_copies, "steps": serve_steps})
