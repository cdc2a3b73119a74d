"""benchmark/study.py: what it measures is checked first, and the document's tables are those of its JSON."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from forked import run_script
from server_fixture import ROOT

sys.path.append(str(ROOT / "benchmark"))

from questions import QUESTIONS
from questions.bench import Bench
from questions.options import AS_WRITTEN_A
from questions.pairs import Pairs, methods_on
from study import MARK, fill, results_of


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Every question that a CPU can answer, in one process as a user runs it."""
    folder = tmp_path_factory.mktemp("study")
    script = ROOT / "benchmark" / "study.py"
    status, output = run_script(script, "--quick", "--out", str(folder), log=folder / "log")
    assert status == 0, output
    return json.loads((folder / "study.json").read_text()), folder


def test_every_question_of_a_cpu_has_rows_a_plot_and_tables(results) -> None:
    found, folder = results
    for question in QUESTIONS:
        if question.needs_cuda:
            assert question.name not in found
            continue
        assert found[question.name]["rows"]
        assert (folder / f"{question.name}.png").stat().st_size > 10_000
        assert question.title in (folder / "tables.md").read_text()
        for table in question.tables(found[question.name]["rows"]):
            assert table.rows and all(len(row) == len(table.headers) for row in table.rows)


def test_option_a_as_the_seed_wrote_it_copies_nothing(results) -> None:
    rows = results[0]["options"]["rows"]
    assert {row["copies"] for row in rows if row["method"] == AS_WRITTEN_A} == {False}
    assert all(row["copies"] for row in rows if row["method"] != AS_WRITTEN_A)


def test_a_method_that_does_not_copy_is_never_measured() -> None:
    pairs = Pairs.vectors([4, 5], torch.device("cpu"))
    assert methods_on(torch.device("cpu"), pairs)
    with pytest.raises(RuntimeError, match="lazy"):
        pairs.check({"lazy": lambda: None})


def test_calls_are_counted_and_timed() -> None:
    tensor = torch.zeros(4)
    bench = Bench(torch.device("cpu"), quick=True)
    (row,) = bench.rows({"twice": lambda: tensor.add_(1).mul_(2)}, size=4)
    assert row["launches"] == 2 and row["size"] == 4
    assert row["completion_us"] >= row["enqueue_us"] > 0


def test_a_document_gets_the_tables_of_the_results(results) -> None:
    text = "before\n<!-- options cpu 0 -->\nold\n<!-- end -->\n<!-- options cuda 0 -->\nkept\n<!-- end -->\n"
    filled = fill(text, results[0])
    assert "old" not in filled and "kept" in filled and AS_WRITTEN_A in filled
    assert fill(filled, results[0]) == filled
    assert [match.group(3) for match in MARK.finditer(filled)] == ["cpu", "cuda"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_kernel_variants_compile_and_can_be_called(tmp_path: Path) -> None:
    """The launchers' arguments were types of an unnamed namespace, so the library did not export them."""
    import copy_variants

    library = ctypes.CDLL(str(copy_variants.compile_library(tmp_path, "sm_90")))
    assert library.launch_copy


@pytest.mark.parametrize("machine", ["h200", "cpu"])
def test_the_study_says_what_was_measured(machine: str) -> None:
    """docs/study.md holds the tables of the committed results, every one of them, and no other."""
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    results = results_of(ROOT / "docs" / "results" / "2026-11-21-study" / machine)
    device = {"h200": "cuda", "cpu": "cpu"}[machine]
    marks = [match.group(2) for match in MARK.finditer(text) if match.group(3) == device]
    assert marks and set(marks) <= results.keys()
    assert fill(text, results) == text
