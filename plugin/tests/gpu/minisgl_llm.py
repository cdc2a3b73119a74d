"""One mini-sglang LLM in a process of its own: `minisgl_llm.py PART MODEL CASE OUT`, for minisgl_check.py.

The mode is that of MINISGL_USE_FUSED_COPY. The result is written to OUT as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIZES = (1, 8, 64, 256)
# What LLM is given in each case.
CASES = {
    "fa": {"attention_backend": "fa"},
    "fa, page 16, few slots": {
        "attention_backend": "fa",
        "page_size": 16,
        "max_running_req": 24,
        "num_page_override": 12000,
    },
    "fa prefill, FlashInfer decode": {"attention_backend": "fa,fi"},
}
COMMON = {
    "use_dummy_weight": True,
    "max_seq_len_override": 2048,
    "cuda_graph_bs": [1, 2, 4, 8, 16, 32, 64],
    "num_page_override": 40960,
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
        arguments["num_page_override"] = arguments["num_page_override"] // arguments["page_size"]
    llm = LLM(model, **arguments)
    print(f"mode {mode.value}, {type(llm.engine.attn_backend).__name__}", flush=True)
    return llm


def requests() -> tuple[list[list[int]], list[Any]]:
    """300 prompts of all lengths, every other one with a common beginning; answers of all lengths, too."""
    from minisgl.core import SamplingParams

    rng = random.Random(0)
    shared = [rng.randrange(3, 500) for _ in range(90)]
    prompts, params = [], []
    for number in range(300):
        own = [rng.randrange(3, 500) for _ in range(rng.randrange(2, 200))]
        prompts.append(shared + own if number % 2 else own)
        params.append(
            SamplingParams(temperature=0.0, ignore_eos=number % 3 > 0, max_tokens=rng.randrange(2, 90))
        )
    return prompts, params


def measure_tokens(model: str, case: str, out: str) -> None:
    """The answers, twice: the second time prefixes are in the cache."""
    llm = start_llm(model, **(COMMON | CASES[case]))
    rounds = []
    for _ in range(2):
        started = time.monotonic()
        answers = [answer["token_ids"] for answer in llm.generate(*requests())]
        rounds.append(answers)
        print(f"{sum(map(len, answers))} tokens in {time.monotonic() - started:.1f} s", flush=True)
    Path(out).write_text(json.dumps(rounds))


class InputsCheck:
    """Compares, at every replay, what the graph reads with mini-sglang's own tensors for the same batch."""

    def __init__(self, llm: Any) -> None:
        import torch
        from sglang_nsa.minisgl.hooks import find_buffers

        self.llm, self.runner = llm, llm.engine.graph_runner
        self.buffers = find_buffers(self.runner)
        names = [*(field.name for field in self.buffers.fields), "write_tuple"]
        self.different = {name: torch.zeros((), dtype=torch.int64, device=llm.device) for name in names}
        self.replays = self.rows = 0
        self._prepare, self._replay = llm._prepare_batch, self.runner.replay
        llm._prepare_batch, self.runner.replay = self.prepare, self.replay

    def prepare(self, batch: Any) -> Any:
        """On the scheduler's stream: mini-sglang's own tensors, also where ours does without them."""
        from minisgl.scheduler import scheduler

        prepared = self._prepare(batch)
        if batch.is_decode and not hasattr(batch, "positions"):
            batch.positions = scheduler._make_positions(batch, self.llm.device)
            batch.own_mapping = scheduler._make_input_tuple(batch, self.llm.device)
            batch.out_loc = self.llm.engine.page_table[batch.own_mapping]
            if self.buffers.attention is not None:
                self.llm.engine.attn_backend.prepare_metadata(batch)
            own = scheduler._make_write_tuple(batch, self.llm.device)
            batch.own_write, batch.write = own, prepared.write_tuple
        return prepared

    def replay(self, batch: Any) -> Any:
        """On the engine's stream."""
        if hasattr(batch, "own_mapping"):
            batch.input_ids = self.llm.token_pool[batch.own_mapping]
        logits = self._replay(batch)
        bs = batch.padded_size
        for field, own in zip(self.buffers.fields, self.buffers.sources()(batch), strict=True):
            found = self.buffers.tensor(field)
            if field.is_table:  # beyond a row's pages mini-sglang copies what nobody reads
                found = found[:bs, : own.shape[1]]
                lens = batch.attn_metadata.cache_seqlens[:, None]
                page_size = self.llm.engine.ctx.page_size
                live = own.new_tensor(range(own.shape[1]))[None, :] * page_size < lens
                wrong = (found != own) & live
            else:
                wrong = found[: bs + field.extra] != own
            self.different[field.name] += wrong.sum()
        if hasattr(batch, "own_write"):
            for ours, own in zip(batch.write, batch.own_write, strict=True):
                self.different["write_tuple"] += (ours != own).sum()
        self.replays, self.rows = self.replays + 1, self.rows + batch.size
        return logits


def measure_inputs(model: str, case: str, out: str) -> None:
    """Every replay of 300 requests, all static inputs."""
    llm = start_llm(model, **(COMMON | CASES[case]))
    check = InputsCheck(llm)
    llm.generate(*requests())
    different = {name: int(count) for name, count in check.different.items()}
    Path(out).write_text(json.dumps({"replays": check.replays, "rows": check.rows, "different": different}))


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
    fused = FusedReplay(buffers).copy
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
    """Host time of some of a scheduler's methods while it is entered, for full decode batches alone."""

    def __init__(self, llm: Any, bs: int) -> None:
        self.bs, self.spent, self.steps = bs, {}, []
        self._started = 0.0
        self._methods = (
            (llm, "_prepare_batch"),
            (llm, "_forward"),
            (llm.engine.graph_runner, "replay"),
        )

    def __enter__(self) -> None:
        self._started = 0.0
        for owner, name in self._methods:
            setattr(owner, name, self._timed(getattr(owner, name), name))

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


def measure_steps(model: str, case: str, out: str) -> None:
    """Whole decode steps of full batches; modes 0 and 1 by turns in one process, which is started with 1."""
    from minisgl.core import SamplingParams

    arguments = {"attention_backend": case, "cuda_graph_bs": list(SIZES), "max_running_req": 256}
    llm = start_llm(model, **(COMMON | arguments))
    mode = os.environ["MINISGL_USE_FUSED_COPY"]
    variants = {mode: contextlib.nullcontext}
    if mode == "1":
        variants = {"0": lambda: own_copies(llm), "1": contextlib.nullcontext}
    rng, rows = random.Random(1), []
    for bs in SIZES:
        prompts = [[rng.randrange(3, 500) for _ in range(64)] for _ in range(bs)]

        def generate(tokens: int, prompts: list = prompts) -> None:
            llm.generate(prompts, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens))

        generate(8)
        watches, calls = {name: Watch(llm, bs) for name in variants}, {}
        for name, variant in variants.items():
            with variant():
                calls[name] = (count_calls(lambda: generate(28)) - count_calls(lambda: generate(20))) / 8
        for _ in range(3):
            for name, variant in variants.items():
                with variant(), watches[name]:
                    generate(60)
        for name, watch in watches.items():
            rows.append({"mode": name, "bs": bs, "enqueues_per_step": calls[name], **watch.medians()})
            print(rows[-1], flush=True)
    Path(out).write_text(json.dumps(rows))


PARTS = {"inputs": measure_inputs, "tokens": measure_tokens, "copies": measure_copies, "steps": measure_steps}


if __name__ == "__main__":
    part, model, case, out = sys.argv[1:]
    PARTS[part](model, case, out)
