"""The metadata benchmark itself: what it writes, and that it refuses to measure wrong results."""

from __future__ import annotations

import json

import pytest
import torch
from nsa_cases import wrap_run
from sglang import bench_metadata
from sglang.benchmark_metadata import cases
from sglang.benchmark_metadata.cases import BenchCase
from sglang.benchmark_metadata.measure import count_activity
from sglang.srt.layers.attention.nsa.metadata import MetadataMode
from sglang.srt.layers.attention.nsa.metadata_check import MetadataMismatchError
from sglang.srt.layers.attention.nsa.replicate import FusedReplication

REQUIRED = {
    "device", "mode", "bs", "context", "N", "page_size", "path", "copy",
    "completion_us", "enqueue_us", "gpu_us", "launches", "bytes", "ratio",
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    grid = [BenchCase(MetadataMode.DECODE, 2, 256, n) for n in (2, 3)]
    grid += [BenchCase(MetadataMode.DRAFT_EXTEND, 2, 256, 1)]
    monkeypatch.setitem(cases.GRIDS, "quick", lambda: grid)
    monkeypatch.setitem(bench_metadata._LINE_SECONDS, "quick", 0.001)


def test_results_and_pictures(tiny, tmp_path, capsys):
    out, pictures = tmp_path / "results.json", tmp_path / "pictures"
    assert bench_metadata.main(["--quick", "--json", str(out), "--plot", str(pictures)]) == 0
    rows = json.loads(out.read_text())
    assert all(row.keys() >= REQUIRED for row in rows)
    assert {row["path"] for row in rows} == {
        "recompute",
        "replicate",
        "shared",
        "in_graph",
        "indirect",
        "floor",
    }
    for row in rows:
        if row["skipped"]:
            assert row["copy"] in ("streams", "triton") and row["completion_us"] is None
        else:
            assert row["completion_us"] > 0
    by_route = {(r["mode"], r["N"], r["path"], r["copy"], r["generator"]): r for r in rows}
    for n in (2, 3):
        recompute = by_route["DECODE", n, "recompute", "-", "torch"]
        assert recompute["ratio"] == 1
        assert recompute["launches"] > 10 * n
        # One call, which launches twice; on a GPU the profiler counts both.
        assert by_route["DECODE", n, "replicate", "fused", "fused"]["launches"] == 1
        assert by_route["DECODE", n, "replicate", "direct", "fused"]["launches"] == 1
        assert by_route["DECODE", n, "indirect", "-", "fused"]["table_bytes"] == 0
        assert by_route["DECODE", n, "replicate", "fused_n", "fused"]["launches"] == 1 + n
        assert by_route["DECODE", n, "shared", "-", "fused"]["launches"] == 1
    assert {path.suffix for path in pictures.iterdir()} == {".png"}
    assert len(list(pictures.iterdir())) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DECODE")]
    assert len(lines) == sum(row["mode"] == "DECODE" for row in rows)


def test_json_comes_last_without_a_file(tiny, capsys):
    bench_metadata.main(["--quick", "--draft-seqlens", "step"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["draft_seqlens"] for row in rows} == {"step"}


def test_a_wrong_path_is_never_measured(tiny, monkeypatch):
    wrap_run(monkeypatch, FusedReplication, lambda run: lambda max_len: None)
    with pytest.raises(MetadataMismatchError):
        bench_metadata.main(["--quick"])


def test_operators_are_counted():
    tensor = torch.zeros(4)
    twice, never = count_activity([lambda: tensor.add_(1).mul_(2), lambda: None], torch.device("cpu"))
    assert (twice.count, never.count) == (2, 0)


@pytest.mark.parametrize(
    "arguments, word",
    [(["--replot", "x.json"], "--plot"), (["--page-size", "48"], "48"), (["--device", "tpu"], "tpu")],
)
def test_bad_arguments_are_named(arguments, word, capsys):
    with pytest.raises(SystemExit):
        bench_metadata.main(arguments)
    assert word in capsys.readouterr().err
