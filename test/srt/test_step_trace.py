"""What benchmark/step_trace.py reads out of a trace: steps by their graphs, busy time, gaps, kernels. And the
two benchmarks of decode steps, end to end."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark"))
import prefill_interference
import profile_step
import step_trace

# (graph, kernels), each kernel 2 us and 1 us after the one before it; then an eager copy, and 20 us nothing.
GRAPHS = (("draft", 3), ("verify", 5), ("extend", 2))


def trace(steps: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    now, correlation = 100.0, 0

    def add(category: str, name: str, ts: float, dur: float) -> None:
        args = {"correlation": correlation}
        events.append({"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "args": args})

    for _ in range(steps):
        for graph, kernels in GRAPHS:
            correlation += 1
            add("cuda_runtime", "cudaGraphLaunch", now - 5, 4)
            for _ in range(kernels):
                add("kernel", f"void at::native::{graph}<float>(int)", now, 2)
                now += 3
        correlation += 1
        add("gpu_memcpy", "Memcpy DtoH", now, 1)
        now += 21
    return events


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_step_is_found_and_measured(suffix: str, tmp_path: Path) -> None:
    raw = json.dumps({"traceEvents": [*trace(6), {"ph": "M", "name": "process_name"}]}).encode()
    path = tmp_path / f"trace{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix == ".json.gz" else raw)
    profile = step_trace.analyse(step_trace.read_events(path))
    assert (profile.steps, profile.graphs_per_step, profile.step_us) == (5, 3, 51.0)
    assert (profile.kernels_per_step, profile.eager_per_step) == (11.0, 1.0)
    assert (profile.busy_us, profile.kernel_gap_us, profile.launch_gap_us) == (21.0, 10.0, 20.0)
    assert profile.idle_share == pytest.approx(30 / 51)
    kernels = [(s.name, s.count, s.us, s.idle_us) for s in profile.kernels[:2]]
    assert kernels == [("verify", 5, 10, 5), ("draft", 3, 6, 18)]
    assert [(s.name, s.count) for s in profile.host] == [("cudaGraphLaunch", 3)]
    assert "| 51 | 21 | 20 | 10 | 58.8% | 11.0 | 1.0 | 3 |" in step_trace.markdown("a step", profile)


def test_a_trace_without_two_steps_says_so() -> None:
    with pytest.raises(ValueError, match="1 graph launches"):
        step_trace.analyse(trace(1)[:4])


def test_a_step_of_our_engine_is_profiled(dummy_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.md"
    sizes = ["--prompt-len", "20", "--timed-steps", "3", "--max-new-tokens", "300", "--steps", "2"]
    assert profile_step.main(["--model-path", str(dummy_model), *sizes, "--markdown", str(out)]) == 0
    text = out.read_text()
    assert "(mean of 3, no profiler), accept length" in text
    for span in ("Scheduler.step", "TpModelWorker.launch_decode", "StepGraph.replay", "PendingDecode.read"):
        assert f"| `{span}` | 1.0 |" in text


def test_arriving_prompts_are_measured_by_burst_and_rate(dummy_model: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "interference.json", tmp_path / "interference.png"
    sizes = ["--running", "2", "--arriving-len", "40", "--seconds", "0.4", "--rates", "5", "20"]
    flags = ["--model-path", str(dummy_model), *sizes, "--bursts", "0", "--steps", "2"]
    flags += ["--max-new-tokens", "1000", "--json", str(out), "--plot", str(picture)]
    assert prefill_interference.main(flags) == 0
    rows = json.loads(out.read_text())
    assert [(row["burst"], row["rate"]) for row in rows] == [(0, 5), (0, 20)]
    assert all(row["alone_ms"] > 0 and row["arriving_ms"] > 0 and len(row["ticks"]) > 3 for row in rows)
    assert picture.stat().st_size > 1000
