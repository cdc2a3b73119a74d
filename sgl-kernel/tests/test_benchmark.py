"""The kernel benchmarks run, and every line has what it is compared with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_script

FOLDER = Path(__file__).resolve().parent.parent / "benchmark"
BENCHMARK, REPLAY_BENCHMARK = FOLDER / "bench_fused_metadata_copy.py", FOLDER / "bench_replay_copy.py"


def test_every_line_has_a_floor(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--bs", "2", "--cols", "256", "--repeats", "2", "--json", str(out)]
    status, output = run_script(BENCHMARK, *arguments, log=tmp_path / "log")
    assert status == 0, output
    result = json.loads(out.read_text())
    assert result["limits"] == 0  # they are an H200's
    assert result["floors"]["bandwidth_gb_s"] > 0
    for case in result["cases"]:
        assert case["floor_us"] >= case["megabytes"] / result["floors"]["bandwidth_gb_s"] * 999
        assert case["ratio"] == case["gpu_us"] / case["floor_us"]
    names = " ".join(case["name"] for case in result["cases"])
    for part in ("copy plan N=15", "generate plan N=7", "shared tables", "vectors alone", "SGLang's multi"):
        assert part in names
    megabytes = {case["name"]: case["megabytes"] for case in result["cases"]}
    for name in ("shared tables", "in graph"):  # a sector of each page, and every slot: 32 and 256 bytes
        saved = megabytes[f"{name} by column N=7 bs=32 cols=256"] - megabytes[f"{name} N=7 bs=32 cols=256"]
        assert saved * 1e6 == pytest.approx(32 * 4 * (256 - 32))


def test_the_replay_copy_is_measured_beside_its_competitors(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--bs", "1", "3", "--width", "40", "--most-width", "64", "--repeats", "2", "--calls", "3"]
    arguments += ["--device", "cpu", "--json", str(out)]
    status, output = run_script(REPLAY_BENCHMARK, *arguments, log=tmp_path / "log")
    assert status == 0, output
    results = json.loads(out.read_text())["results"]
    methods = ["six copy_", "_foreach_copy_", "fused_copy_replay_data", "ReplayCopyPlan"]
    assert [(r["bs"], r["method"]) for r in results] == [(bs, m) for bs in (1, 3) for m in methods]
    assert all(r["enqueue_us"] > 0 and r["row_us"] > 0 for r in results)
