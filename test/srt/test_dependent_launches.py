"""A kernel that starts before the one before it has ended must wait first: one that does not reads, now and
then, what is not there yet. No run shows that reliably; the source does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import sglang.srt.layers as layers

FILES = sorted(path for path in Path(layers.__path__[0]).rglob("*.py") if "@triton.jit" in path.read_text())


def launched(tree: ast.AST) -> set[str]:
    """Names of the kernels in calls of the form kernel[grid](...)."""
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {ast.unparse(function.value) for function in called if isinstance(function, ast.Subscript)}


def test_the_kernels_are_found() -> None:
    kernels = set().union(*(launched(ast.parse(path.read_text())) for path in FILES))
    assert {"_add_norm_kernel", "_gate_up_kernel", "_sparse_mla_kernel", "_noise_kernel"} <= kernels


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_launched_kernel_waits_before_anything_else(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for kernel in tree.body:
        if isinstance(kernel, ast.FunctionDef) and kernel.name in launched(tree):
            body = kernel.body[1:] if ast.get_docstring(kernel) else kernel.body
            assert ast.unparse(body[0]) == "wait_for_inputs(DEPENDENT)", f"{path.name}: {kernel.name}"
