"""What happens where the fused kernels cannot be had: missing, unloadable, failing later."""

from __future__ import annotations

import logging
import os
import random
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from forked import ForkedProcess, run_code
from nsa_cases import MetadataCase, StaticInputs, graph_metadata, poison_all, random_batch, replay, wrap_run
from sglang.srt.layers.attention.nsa import paths
from sglang.srt.layers.attention.nsa.kernels import load_kernels
from sglang.srt.layers.attention.nsa.metadata_generators import FusedGenerator, TorchGenerator
from sglang.srt.layers.attention.nsa.paths import TORCH_METHODS
from sglang.srt.layers.attention.nsa.replicate import FusedReplication

CASE = MetadataCase(backends=3)
LAYOUTS = ["replicate", "shared", "in_graph", "indirect"]


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Each test is a process of its own as far as the one warning goes."""
    paths._warn_fallback.cache_clear()
    yield
    paths._warn_fallback.cache_clear()


@pytest.fixture
def missing(monkeypatch) -> str:
    """No sgl_kernel can be imported."""
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    return "not installed"


@pytest.fixture
def foreign(monkeypatch) -> str:
    """Another distribution of the same import name."""
    module = ModuleType("sgl_kernel")
    module.__file__ = "site-packages/sgl_kernel/__init__.py"
    monkeypatch.setitem(sys.modules, "sgl_kernel", module)
    return "another library"


@pytest.fixture(params=["missing", "foreign"])
def no_library(request) -> str:
    return request.getfixturevalue(request.param)


def run_replays(graph, inputs, count: int = 5) -> None:
    rng = random.Random(0)
    for _ in range(count):
        batch = random_batch(CASE, CASE.max_bs, rng)
        inputs.load(batch)
        poison_all(graph)
        replay(graph, CASE.max_bs, inputs.max_len(batch))
        graph.check(CASE.max_bs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_without_the_library_is_torch_and_one_warning(no_library, layout, caplog):
    with caplog.at_level(logging.WARNING):
        graphs = []
        for _ in range(3):  # a server has a graph for the draft, the verification and the extension
            inputs = StaticInputs(CASE)
            graphs.append((graph_metadata(CASE, inputs, layout, "auto"), inputs))
        for graph, inputs in graphs:
            run_replays(graph, inputs)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert no_library in caplog.text
    for graph, _ in graphs:
        assert graph.methods == TORCH_METHODS
        assert graph.fallbacks == 1
        assert no_library in graph.fallback_reason


def test_an_unloadable_library_is_torch_and_one_warning(tmp_path):
    """What a process has loaded stays loaded, so this takes a process of its own."""
    (tmp_path / "libsgl_kernel_cpu.so").write_bytes(b"not an ELF file")
    program = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="LOG %(levelname)s %(message)s")
from test_nsa_fallback import CASE, LAYOUTS, StaticInputs, graph_metadata, run_replays
for layout in LAYOUTS:
    inputs = StaticInputs(CASE)
    graph = graph_metadata(CASE, inputs, layout, "auto")
    run_replays(graph, inputs)
    assert graph.fallbacks == 1 and "does not load" in graph.fallback_reason
    try:
        graph_metadata(CASE, inputs, layout, "fused")
    except ImportError as error:
        assert "does not load" in str(error)
    else:
        raise AssertionError("fused by name must stop the start")
"""
    environment = os.environ | {"SGL_KERNEL_LIBRARY_DIR": str(tmp_path)}
    log = tmp_path / "output"
    process = ForkedProcess(run_code, program, sys.path, env=environment, log=log)
    assert process.wait(60) == 0, log.read_text()
    output = log.read_text()
    warnings = [line for line in output.splitlines() if line.startswith("LOG ")]
    assert len(warnings) == 1, output
    assert "WARNING" in warnings[0]
    assert "does not load" in warnings[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_by_name_without_the_library_stops_the_start(no_library, layout):
    with pytest.raises(ImportError, match=no_library):
        graph_metadata(CASE, StaticInputs(CASE), layout, "fused")


def test_direct_by_name_without_the_library_stops_the_start(no_library):
    with pytest.raises(ImportError, match=no_library):
        graph_metadata(CASE, StaticInputs(CASE), "replicate", "direct")


def test_torch_by_name_does_not_need_the_library(no_library, caplog):
    inputs = StaticInputs(CASE)
    with caplog.at_level(logging.WARNING):
        graph = graph_metadata(CASE, inputs, "replicate", "torch")
        run_replays(graph, inputs)
    assert graph.methods.copy == "torch"
    assert graph.methods.generator is TorchGenerator
    assert graph.fallbacks == 0
    assert not caplog.records


def test_the_flag_switched_off_never_looks_for_the_library(no_library, caplog):
    inputs = StaticInputs(CASE)
    with caplog.at_level(logging.WARNING):
        run_replays(graph_metadata(CASE, inputs, "recompute", "auto"), inputs)
    assert not caplog.records


def fail_after(monkeypatch, owner: type, calls: int) -> None:
    """From its n-th call on the kernel raises what a launch would. To be set up before planning."""
    seen = []

    def failing(run):
        def wrapped(max_len: int) -> None:
            seen.append(max_len)
            if len(seen) > calls:
                raise RuntimeError("CUDA error: an illegal launch")
            run(max_len)

        return wrapped

    wrap_run(monkeypatch, owner, failing)


FAILING = [("replicate", FusedReplication), ("shared", FusedGenerator)]
FAILING += [("in_graph", FusedGenerator), ("indirect", FusedGenerator)]


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("layout, owner", FAILING)
def test_auto_falls_back_once_when_kernels_fail(layout, owner, calls, monkeypatch, caplog):
    fail_after(monkeypatch, owner, calls)
    inputs = StaticInputs(CASE)
    graphs = [graph_metadata(CASE, inputs, layout, "auto", batch_sizes=(3, 8)) for _ in range(2)]
    assert all(graph.methods.generator is FusedGenerator for graph in graphs)
    with caplog.at_level(logging.WARNING):
        for graph in graphs:
            run_replays(graph, inputs)
    assert len(caplog.records) == 1
    assert "an illegal launch" in caplog.text
    for graph in graphs:
        assert graph.methods == TORCH_METHODS
        assert graph.fallbacks == 1
        assert "an illegal launch" in graph.fallback_reason
        replay(graph, 3, CASE.longest)  # the sizes that were not running were planned again, too
        graph.check(3)
    assert graphs[0].replays == 6


@pytest.mark.parametrize("layout, owner", FAILING)
def test_auto_falls_back_when_a_plan_cannot_be_made(layout, owner, monkeypatch, caplog):
    def refuse(self, *args):
        raise RuntimeError("no kernel image for this device")

    monkeypatch.setattr(owner, "__init__", refuse)
    inputs = StaticInputs(CASE)
    with caplog.at_level(logging.WARNING):
        graph = graph_metadata(CASE, inputs, layout, "auto")
        run_replays(graph, inputs)
    assert len(caplog.records) == 1
    assert graph.fallbacks == 1


@pytest.mark.parametrize("layout, owner", FAILING)
def test_fused_by_name_raises_when_kernels_fail(layout, owner, monkeypatch):
    fail_after(monkeypatch, owner, 1)
    inputs = StaticInputs(CASE)
    graph = graph_metadata(CASE, inputs, layout, "fused")
    with pytest.raises(RuntimeError, match="an illegal launch"):
        run_replays(graph, inputs)
    assert graph.fallbacks == 0


def test_failures_of_torch_itself_are_not_hidden(monkeypatch):
    fail_after(monkeypatch, TorchGenerator, 0)
    inputs = StaticInputs(CASE)
    graph = graph_metadata(CASE, inputs, "replicate", "auto", methods=TORCH_METHODS)
    with pytest.raises(RuntimeError, match="an illegal launch"):
        run_replays(graph, inputs)


def test_a_wrong_argument_is_an_error_and_no_fallback():
    """The kernel's own validation: a bound that is no number of columns raises by name."""
    inputs = StaticInputs(CASE)
    graph = graph_metadata(CASE, inputs, "replicate", "fused")
    with pytest.raises(RuntimeError, match="max_len"):
        graph._launch[CASE.max_bs](10 * CASE.width)


def test_load_kernels_names_an_unknown_device():
    with pytest.raises(ImportError, match="no operators for meta"):
        load_kernels("meta")


def test_fallback_keeps_the_memory_of_the_layout():
    """Shared stays shared: only how the set is written changes."""
    case = replace(CASE, backends=7)
    inputs = StaticInputs(case)
    graph = graph_metadata(case, inputs, "shared", "auto", methods=TORCH_METHODS)
    held, separate = graph.table_bytes
    assert separate == 7 * held
