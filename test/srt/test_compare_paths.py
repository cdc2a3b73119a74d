"""benchmark/compare_paths.py end to end: a server for each path, and all give the same answers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from forked import run_script
from server_fixture import ROOT

sys.path.append(str(ROOT / "benchmark"))

from compare_paths import PATHS, ServerPath, build_parser, candidates, tables, terminate_all
from compare_servers import Case
from server_process import children, free_port, send_signal, started

# A server of its own for each is slow: these differ in all that is compared.
STARTED = ("replicate, fused", "indirect")


def test_paths_give_the_same_answers(dummy_model: Path, tmp_path: Path) -> None:
    flags = ["--model", str(dummy_model), "--cases", "100x2", "30x1", "--output-len", "8", "--rounds", "1"]
    flags += ["--steps", "3", "--out", str(tmp_path / "out"), "--paths", *STARTED]
    script = ROOT / "benchmark" / "compare_paths.py"
    status, said = run_script(script, *flags, log=tmp_path / "said")
    assert status == 0, said
    name = f"server_paths_{dummy_model.name}"
    result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    rows = result["rows"]
    assert [(r["path"], r["prompt"], r["requests"]) for r in rows] == [
        (path, *size) for size in ((100, 2), (30, 1)) for path in STARTED
    ]
    assert all(r["same"] == 1 and r["fallbacks"] == 0 and r["tpot_ms"] > 0 for r in rows)
    held = {r["path"]: r["tables_mib"] for r in rows}
    assert held["indirect"] == 0 < held["replicate, fused"]
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    assert str(tables(rows)[0]) in (tmp_path / "out" / f"{name}.md").read_text()


@pytest.mark.parametrize("name, path", PATHS.items())
def test_each_path_is_a_server_of_its_own(name: str, path: ServerPath) -> None:
    args = build_parser().parse_args(["--cases", "100x3", "2000x2"])
    (command,) = [c for c in candidates("model", ["--seed-flag"], args) if c.name == name]
    assert "--max-total-tokens 5152 " in command.command and "--max-running-requests 3 " in command.command
    assert ("--nsa-metadata-layout" in command.command) == (path.layout is not None)
    assert command.env["SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA"] == str(int(path.layout is not None))
    assert args.cases == [Case(100, 3), Case(2000, 2)]


def test_servers_that_are_asked_to_end_at_once_leave_nothing() -> None:
    """A shell that ended first left its server running: nobody knew of it any more."""
    with started("sleep 300 & sleep 300; true", free_port(), {}) as server:
        while len(below := children(server.process.pid)) < 2:
            time.sleep(0.01)
        terminate_all([server])
        server.process.wait()
    assert [pid for pid in below if send_signal(pid, 0)] == []
