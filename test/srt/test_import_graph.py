"""The modules of the server import each other without circles, and lower ones never higher ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import sglang

ROOT = Path(sglang.__file__).parent
# (a folder of srt/, what no module in it may import)
WRONG_WAYS = [
    ("layers", ("managers", "speculative", "entrypoints", "server_args")),
    ("mem_cache", ("speculative", "entrypoints")),
    ("model_executor", ("managers", "speculative", "entrypoints")),
    ("models", ("managers", "speculative", "entrypoints", "mem_cache")),
    ("sampling", ("managers", "layers", "speculative", "entrypoints")),
    ("managers", ("entrypoints",)),
]


def module_name(path: Path) -> str:
    return ".".join(["sglang", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def import_nodes(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All that can run, those inside functions too: they would hide a circle. Not what is for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from import_nodes(node)


def imported(name: str, source: str) -> set[str]:
    """The modules of this tree that the module `name` imports."""
    found: set[str] = set()
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in import_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        prefix = package[: len(package) + 1 - node.level] if node.level else []
        base = ".".join([*prefix, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            found.add(inner if inner in MODULES else base)
    return found & MODULES.keys()


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {name: imported(name, path.read_text()) for name, path in MODULES.items()}


def test_there_is_no_circle(graph: dict[str, set[str]]) -> None:
    """The sampler and its kernel, and the two workers, imported each other through functions."""
    assert circle(graph) is None


@pytest.mark.parametrize(("folder", "above"), WRONG_WAYS, ids=lambda value: str(value))
def test_nothing_points_up(folder: str, above: tuple[str, ...], graph: dict[str, set[str]]) -> None:
    """`layers/logprobs.py` imported the messages between the processes."""
    names = [name for name in graph if name.startswith(f"sglang.srt.{folder}.")]
    assert names, f"srt/{folder} is gone"
    wrong = tuple(f"sglang.srt.{part}" for part in above)
    assert [f"{name} -> {other}" for name in names for other in graph[name] if other.startswith(wrong)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import sglang.srt.managers.scheduler",
        "from sglang.srt.managers import scheduler",
        "from sglang.srt.managers.scheduler import Scheduler",
        "from ...managers import scheduler",
        "def late():\n    from sglang.srt.managers.scheduler import Scheduler",
    ],
)
def test_every_form_of_import_is_seen(source: str) -> None:
    assert imported("sglang.srt.layers.attention.registry", source) == {"sglang.srt.managers.scheduler"}


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) is not None
    types_only = "if TYPE_CHECKING:\n    from sglang.srt.managers.scheduler import Scheduler"
    assert imported("sglang.srt.layers.attention.registry", types_only) == set()
