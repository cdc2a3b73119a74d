"""benchmark/kernels.py end to end on the CPU: every kernel, what it reports, and its comparison."""

from __future__ import annotations

import json
from pathlib import Path

from forked import run_script
from server_fixture import ROOT


def test_every_kernel_is_checked_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    script = ROOT / "benchmark" / "kernels.py"
    status, output = run_script(script, "--rounds", "1", "--json", str(out), log=tmp_path / "log")
    assert status == 0, output
    results = json.loads(out.read_text())["results"]
    assert {r["kernel"] for r in results} == {"sparse MLA", "index", "experts"}
    assert all(r["us"] > 0 and r["error"] < 1e-5 for r in results)
    assert all(abs(r["ratio"] * r["floor_us"] - r["us"]) < 1e-6 * r["us"] for r in results)
    *table, floors = output.splitlines()
    assert len(table) == 2 + len(results) and floors.startswith("floors are those of")
