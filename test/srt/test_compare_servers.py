"""benchmark/compare_servers.py: two servers by turns and one that does not start; its processes all end."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest
from forked import ForkedProcess, exec_script, run_script
from server_fixture import MODEL_NAME, ROOT, RunningServer, is_running

sys.path.insert(0, str(ROOT / "benchmark"))

import server_process
from compare_servers import Case, Row, build_parser, candidates, table

SCRIPT = ROOT / "benchmark" / "compare_servers.py"
# Serves one port by what another answers.
FORWARD = """
import asyncio, sys

async def copy(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()

async def answer(reader, writer):
    there = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

async def main():
    async with await asyncio.start_server(answer, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()

asyncio.run(main())
"""


def test_servers_by_turns_and_one_that_fails(
    server: RunningServer, dummy_model: Path, tmp_path: Path
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["--model-path", str(dummy_model), "--steps", "3"]
    flags += ["--ours", "ours", f"--max-total-tokens 8192 --served-model-name {MODEL_NAME}"]
    flags += ["--server", "broken", "echo {port} is no server"]
    # Behind a shell, in a session of its own, and asked as OpenAI's servers are.
    (tmp_path / "forward.py").write_text(FORWARD)
    forward = f"{sys.executable} {tmp_path / 'forward.py'} {{port}} {server.url.rpartition(':')[2]}"
    flags += ["--server", "theirs", f"setsid {forward} & wait", "vllm"]
    flags += ["--cases", "40x1", "30x3", "--output-len", "6", "--rounds", "1", "--together"]
    flags += ["--json", str(out), "--plot", str(picture), "--logs", str(tmp_path)]
    status, said = run_script(SCRIPT, *flags, log=tmp_path / "said")
    assert status == 1, said
    assert "broken: the server ended with exit code 0; see" in said
    results = json.loads(out.read_text())["results"]
    assert [(r["case"], r["server"]) for r in results] == [
        (case, server) for case in ("40x1", "30x3") for server in ("ours", "theirs")
    ]
    for result in results:
        (figures,) = result["rounds"]
        assert result["failed"] == 0 and all(value > 0 for value in figures.values())
        assert (result["accept_length"] is not None) == (result["server"] == "ours")  # vllm's form has none
    assert "\n| 30x3 | " in said and picture.stat().st_size > 1000


def test_who_ends_it_ends_its_servers(tmp_path: Path) -> None:
    """By SIGTERM, as `timeout` sends it, it died at once and its servers stayed."""
    serve = f"cd {tmp_path}; echo $$ > pid; exec {sys.executable} -m http.server {{port}}"
    flags = ["--model-path", str(tmp_path), "--cases", "1x1", "--json", str(tmp_path / "out.json")]
    flags += ["--server", "never ready", serve]
    running = ForkedProcess(exec_script, str(SCRIPT), flags, env=os.environ, log=tmp_path / "said")
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait(60) == 1 and "interrupted: SystemExit(143)" in (tmp_path / "said").read_text()
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert json.loads((tmp_path / "out.json").read_text())["results"] == []


def test_what_a_server_leaves_behind_is_ended(tmp_path: Path) -> None:
    """A process that left the session of the command that started it outlived the benchmark."""
    script = "setsid sleep 60 & echo $! > pid; python3 -m http.server {port}"
    port = server_process.free_port()
    (tmp_path / "health").write_text("well")
    command = f"cd {tmp_path}; " + script.format(port=port)
    with server_process.started(command, port, {}, log=tmp_path / "log") as server:
        server.wait_ready(60)
        left = int((tmp_path / "pid").read_text())
        assert is_running(left)
    deadline = time.monotonic() + 10
    while is_running(left):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "at least one server"),
        (["--ours", "a", "--ours", "a"], "a name of its own"),
        (["--server", "a"], "takes NAME COMMAND"),
        (["--server", "a", "serve"], r"must hold \{port\}, got 'serve'"),
        (["--server", "a", "serve {port}", "tgi"], "BACKEND must be one of .* got 'tgi'"),
    ],
)
def test_servers_that_cannot_be_used_are_refused(flags: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        candidates(build_parser().parse_args(["--model-path", "model", *flags]))


@pytest.mark.parametrize("text", ["600", "x8", "600x", "0x1", "600x-1", "axb"])
def test_a_case_that_is_none_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"LENxN, as in 600x8, got '{text}'"):
        Case.parse(text)


def test_the_table_has_the_median_round_and_a_dash_for_what_is_missing() -> None:
    rounds = [
        {"output_throughput": t, "mean_ttft_ms": 10.0, "mean_tpot_ms": None} for t in (300.0, 100.0, 200.0)
    ]
    text = table([Row("a", "5x1", rounds, 0, None)], ["a", "b"], [Case(5, 1)])
    assert text.splitlines()[-1] == "| 5x1 | 200, 10, - | -, -, - |"
