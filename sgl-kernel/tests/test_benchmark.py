"""The kernel benchmark runs, and every line has a floor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmark" / "bench_fused_metadata_copy.py"


def test_every_line_has_a_floor(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--bs", "2", "--cols", "256", "--repeats", "2", "--json", str(out)]
    done = subprocess.run([sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["limits"] == 0  # they are an H200's
    assert result["floors"]["bandwidth_gb_s"] > 0
    for case in result["cases"]:
        assert case["floor_us"] >= case["megabytes"] / result["floors"]["bandwidth_gb_s"] * 999
        assert case["ratio"] == case["gpu_us"] / case["floor_us"]
    names = " ".join(case["name"] for case in result["cases"])
    for part in ("copy plan N=15", "generate plan N=7", "shared tables", "vectors alone", "SGLang's multi"):
        assert part in names
