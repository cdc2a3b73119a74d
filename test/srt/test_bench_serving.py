"""The load generator against a real server: what it reports is what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlparse

import pytest
from server_fixture import RunningServer
from sglang.bench_serving import main


def run(server: RunningServer, *flags: str) -> int:
    return main(["--port", str(urlparse(server.url).port), "--disable-tqdm", "--num-prompts", "6", *flags])


def test_random_prompts_have_their_lengths(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    lengths = ("--random-input-len", "20", "--random-output-len", "8")
    assert run(server, *lengths, "--max-concurrency", "3", "--output-file", str(out)) == 0
    summary = json.loads(out.read_text())
    assert (summary["completed"], summary["errors"]) == (6, 0)
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (6 * 20, 6 * 8)
    for name in ("ttft", "tpot", "e2e_latency"):
        assert 0 < summary[f"median_{name}_ms"] <= summary[f"p99_{name}_ms"]
    assert summary["p99_ttft_ms"] <= summary["p99_e2e_latency_ms"]
    assert summary["accept_length"] >= 1
    assert summary["output_throughput"] == pytest.approx(48 / summary["duration"])
    assert "output_throughput" in capsys.readouterr().out


def test_file_and_request_rate_as_any_openai_server(server: RunningServer, tmp_path: Path) -> None:
    lines = [{"prompt": "one", "max_tokens": 2}, {"prompt": [1, 2, 3]}]
    dataset, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    dataset.write_text("\n".join(map(json.dumps, lines)))
    flags = ("--backend", "openai", "--dataset-name", str(dataset), "--request-rate", "50")
    assert run(server, *flags, "--random-output-len", "4", "--output-file", str(out)) == 0
    summary = json.loads(out.read_text())
    assert summary["total_input_tokens"] == 6 * 3 and summary["accept_length"] is None


def test_errors_are_counted(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--warmup-requests", "0", "--random-input-len", "8", "--random-output-len", "5000")
    assert run(server, *flags) == 1
    out = capsys.readouterr().out
    assert "HTTP 400" in out and "max_tokens" in out


@pytest.mark.parametrize(
    "flags,named",
    [
        (("--request-rate", "0"), "--request-rate"),
        (("--num-prompts", "0"), "--num-prompts"),
        (("--random-range-ratio", "2"), "--random-range-ratio"),
        (("--dataset-name", "/nowhere.jsonl"), "/nowhere.jsonl"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_flags_are_named(flags: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(list(flags))
    assert named in capsys.readouterr().err


def test_no_server_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "1", "--num-prompts", "1", "--disable-tqdm"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
