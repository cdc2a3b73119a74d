"""benchmark/kernels.py end to end on the CPU: every kernel, what it reports, and its comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from server_fixture import ROOT


def test_every_kernel_is_checked_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    command = [sys.executable, str(ROOT / "benchmark" / "kernels.py"), "--rounds", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())["results"]
    assert {r["kernel"] for r in results} == {"sparse MLA", "index", "experts"}
    assert all(r["us"] > 0 and r["error"] < 1e-5 for r in results)
    assert len(done.stdout.splitlines()) == 2 + len(results)
