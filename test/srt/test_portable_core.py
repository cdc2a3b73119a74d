"""The portable core is shipped in the plugin under another name: nothing in it may lean on the runtime."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import sglang.srt.layers.attention.nsa as core

CORE = Path(core.__file__).parent
SRT = CORE.parents[2]
FILES = sorted(CORE.rglob("*.py"))
LAZY = {"triton", "sgl_kernel"}
ALLOWED = set(sys.stdlib_module_names) | {"torch"}
# Only imported when the method that they implement is chosen, so they may import Triton at their top.
TRITON_MODULES = {path.name for path in FILES if "triton" in path.name}


def imports(tree: ast.AST) -> list[tuple[ast.stmt, str, int]]:
    """(statement, top-level module, relative level) of every import in a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name.split(".")[0], 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node, (node.module or "").split(".")[0], node.level))
    return found


def test_the_core_is_there():
    assert {"metadata.py", "paths.py", "replicate.py", "metadata_generators.py", "metadata_check.py"} <= {
        f.name for f in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports(path):
    tree = ast.parse(path.read_text())
    top_level = set(map(id, tree.body))
    for node, module, level in imports(tree):
        where = f"{path.name}:{node.lineno}"
        if level:
            depth = len(path.relative_to(CORE).parts)
            assert level <= depth, f"{where}: leaves the core"
            continue
        assert module in ALLOWED | LAZY, f"{where}: imports {module}"
        if module in LAZY and path.name not in TRITON_MODULES:
            assert id(node) not in top_level, f"{where}: {module} must be imported where it is used"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_environment_and_no_print(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            assert node.id != "print", f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("folder", ["libraries", "mem_cache", "layers"])
def test_what_attention_builds_on_does_not_lean_on_attention(folder):
    """Norms, sampling and the cache once found their libraries and formats in attention/nsa."""
    for path in (SRT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("sglang.srt.layers.attention"), path.name


def test_it_works_under_another_name(tmp_path):
    """A copy of the folder alone, as the plugin's wheel has it, computes metadata."""
    package = tmp_path / "sglang_nsa"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nsa").symlink_to(CORE)
    program = """
import sys, torch
from sglang_nsa.nsa.metadata import MetadataMode, MetadataShape
from sglang_nsa.nsa.nsa_backend_mtp_precompute import MetadataInputs
from sglang_nsa.nsa.paths import GraphMetadata, MetadataSelection
shape = MetadataShape(MetadataMode.DECODE, 2, 1, 128, 64, 2048)
inputs = MetadataInputs(shape, torch.tensor([5, 70]), torch.tensor([1, 2]),
                        torch.arange(3 * 128, dtype=torch.int32).view(3, 128))
for layout in ("replicate", "shared", "in_graph", "indirect"):
    selection = MetadataSelection(True, layout, "torch")
    graph = GraphMetadata(selection, shape, (0, 0, 0), torch.device("cpu"))
    graph.capture(inputs)
    graph.replay(2, 70)
    graph.run_in_graph(2)
    graph.check(2)
assert not [name for name in sys.modules if name.split(".")[0] in ("sglang", "triton", "transformers")]
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
