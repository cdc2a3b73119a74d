"""benchmark/layouts.py end to end on a small model, with one layout: each takes a server of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from server_fixture import ROOT


def test_layouts_are_compared_in_one_run(dummy_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "layouts.json"
    sizes = ["--num-prompts", "2", "--input-len", "100", "--output-len", "8", "--rounds", "1", "--steps", "2"]
    command = [sys.executable, str(ROOT / "benchmark" / "layouts.py"), "--model-path", str(dummy_model)]
    command += [*sizes, "--json", str(out), "--layouts", "indirect"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())["results"]
    assert result["layout"] == "indirect" and result["tpot_ms"] > 0
    assert result["same_tokens"] == result["ratio"] == 1
    assert result["fallbacks"] == 0
