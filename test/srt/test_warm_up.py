"""What prompts need is compiled before the server is ready."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from sglang.srt.managers.warm_up import FILTERED, GREEDY, chunk, pass_shapes, request, warm_up
from worker_driver import generate, make_worker, speculative

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-nsa"
PROMPTS = [list(range(5, 25)), [7] * 30]


@pytest.mark.parametrize("longest", [1, 2, 3, 8, 1000, 8192])
def test_passes_are_of_every_size_that_there_is(longest: int) -> None:
    """Each tile is for so many rows up to twice as many, whatever number they begin with."""
    shapes = pass_shapes(longest, context_len=longest + 300, index_topk=256)
    for keys in (0, 64, 256):
        sizes = [rows for rows, before in shapes if before == keys]
        assert max(sizes) == longest and min(sizes) == 1
        for fewest in range(1, longest // 2 + 1):
            assert any(fewest <= rows <= 2 * fewest for rows in sizes)
    assert all(rows + before <= 40 for rows, before in pass_shapes(30, context_len=40, index_topk=256))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_warm_up_leaves_no_trace(steps: int) -> None:
    fresh, warm = (make_worker(MODEL, **(speculative(steps) if steps else {})) for _ in range(2))
    warm_up(warm, 60, warm.config.index_topk, captured=2, max_running=8)
    pools = fresh.req_to_token_pool, warm.req_to_token_pool
    for name in ("req_to_token", "seq_lens", "last_token", "draft_token", "draft_hidden"):
        columns = [getattr(pool, name)[1:] for pool in pools]  # the padding's is written by every step
        assert columns[0].equal(columns[1]), name
    assert pools[0].free_slots == pools[1].free_slots and pools[0].seq_lens.equal(pools[1].seq_lens)
    assert generate(fresh, PROMPTS, 20) == generate(warm, PROMPTS, 20)
    replays = {"nsa_metadata": None}  # are counted
    assert fresh.internal_state() | replays == warm.internal_state() | replays


@pytest.mark.gpu
def test_no_prompt_waits_for_a_compiler() -> None:
    """Bug: the first prompt of a length, or the first few that came together, took up to four seconds more,
    and all that decoded meanwhile waited too. In a process that has compiled nothing before."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def compile_in_passes() -> None:
    """Starts a worker, runs passes, and exits with the first for which Triton compiles or reads a kernel."""
    import triton

    kernels: list[str] = []
    triton.knobs.compilation.listener = lambda *, src, **others: kernels.append(src.name)
    options = {"device": "cuda", "dtype": "bfloat16", "context_length": 4096, "chunked_prefill_size": 2048}
    options |= {"max_running_requests": 32, "cuda_graph_max_bs": 4, "max_total_tokens": 16384}
    options["skip_server_warmup"] = False
    worker = make_worker(MODEL, **options, **speculative(4))
    assert kernels, "Triton tells of nothing"
    kernels.clear()
    rng = random.Random(0)
    passes = [[n] for n in (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 600, 777, 1023, 2047, 2048)]
    passes += [[rng.choice([5, 17, 37, 64]) for _ in range(n)] for n in (2, 3, 8, 15, 16, 17, 29, 32)]
    for lengths in passes:
        for keys in (0, 1, 100, 255, 256, 257, 1000, 2000):
            worker.prefill([chunk(0, n, keys, GREEDY) for n in lengths])
            if kernels:
                sys.exit(f"chunks of {lengths} behind {keys} keys: {kernels}")
    for bs in range(1, 33):
        for params in (GREEDY, FILTERED):
            worker.launch_decode([request(0, 1, params)] * bs)
            if kernels:
                sys.exit(f"a decode step of {bs}, {params}: {kernels}")


if __name__ == "__main__":
    compile_in_passes()
