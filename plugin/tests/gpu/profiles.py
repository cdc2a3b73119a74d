"""What a trace of torch's profiler says about the decode loop: how busy the GPU is, and what it waits for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path


def summary(folder: Path) -> list[str]:
    """A line for each trace: wall time, GPU busy time, and the kernels of the plugin."""
    lines = []
    for path in sorted(folder.rglob("*.json*")):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        kernels = sorted(
            (e["ts"], e["dur"], e["name"])
            for e in events
            if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        )
        if not kernels:
            lines.append(f"{path.name}: no GPU events")
            continue
        busy, end = 0.0, 0.0
        for start, duration, _ in kernels:
            busy += max(0.0, start + duration - max(start, end))
            end = max(end, start + duration)
        wall = end - kernels[0][0]
        metadata = [d for _, d, name in kernels if "nsa_metadata" in name or "paged_mqa_schedule" in name]
        lines.append(
            f"{path.name}: {wall / 1e3:.1f} ms, GPU busy {100 * busy / wall:.1f} %, {len(kernels)} GPU"
            f" events, {len(metadata)} of the plugin with {sum(metadata):.0f} us together"
        )
    return lines
