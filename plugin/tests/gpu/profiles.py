"""What a trace of torch's profiler says about the decode loop: how busy the GPU is, and with what."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import load
from servers import Server

STEPS = 40  # of the scheduler, in each trace
OURS = ("nsa_metadata_generate", "paged_mqa_schedule_kernel")
SGLANG = (
    "fused_metadata_copy",
    "metadata_copy",
    "get_paged_mqa_logits_metadata",
    "paged_mqa_logits_metadata",
)


def profile(server: Server, requests: int, times: int, seconds: float) -> None:
    """Some short traces while `requests` decode; which path's turn it was, the kernels say."""
    folder = (server.folder / f"profile_{requests}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    body = {"output_dir": str(folder), "num_steps": STEPS, "activities": ["GPU"], "with_stack": False}
    running = load.Background(load.steady, server.port, requests, seconds)
    time.sleep(1)
    for _ in range(times):
        load.Background(load.post, server.port, "/start_profile", body, seconds).wait(seconds)
        time.sleep(0.5)
    running.wait(seconds + 10)
    time.sleep(1)
    for line in summary(folder):
        print(f"    {server.name}, {requests} requests: {line}", flush=True)


def gpu_events(path: Path) -> list[tuple[float, float, str]]:
    """(start, duration, name) of each, in microseconds and in order."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in kinds)


def summary(folder: Path) -> list[str]:
    """A line for each trace: wall time, GPU busy time, launches, whose metadata kernels, and the longest."""
    lines = []
    for path in sorted(folder.rglob("*.json*")):
        events = gpu_events(path)
        if not events:
            lines.append(f"{path.name}: no GPU events")
            continue
        busy, end = 0.0, 0.0
        longest: Counter[str] = Counter()
        for start, duration, name in events:
            busy += max(0.0, start + duration - max(start, end))
            end = max(end, start + duration)
            longest[name.partition("<")[0].partition("(")[0][-40:]] += duration
        wall = end - events[0][0]
        parts = [f"{wall / 1e3:.1f} ms, GPU busy {100 * busy / wall:.1f} %, {len(events)} GPU events"]
        for whose, names in (("plugin", OURS), ("SGLang", SGLANG)):
            found = [
                d
                for _, d, n in events
                if any(name in n for name in names) and not (whose == "SGLang" and _ours(n))
            ]
            parts.append(f"{len(found)} of the {whose}'s metadata, {sum(found):.0f} us")
        parts.append("longest " + ", ".join(f"{n} {t / 1e3:.2f} ms" for n, t in longest.most_common(4)))
        lines.append("; ".join(parts))
    return lines


def _ours(name: str) -> bool:
    return any(part in name for part in OURS)
