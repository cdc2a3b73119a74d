"""The fields of SGLang's requests with their defaults, read from its source without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OWN = {"text", "input_ids", "prompt", "messages", "model", "sampling_params"}  # given by whoever asks
CLASSES = (
    ("/generate", "managers/io_struct.py", "GenerateReqInput", {"text": "x"}),
    ("/v1/completions", "entrypoints/openai/protocol.py", "CompletionRequest", {"prompt": "x"}),
    (
        "/v1/chat/completions",
        "entrypoints/openai/protocol.py",
        "ChatCompletionRequest",
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
    ),
)


def defaults_of_sglang(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A route, and a body that spells out every field that SGLang has for it."""
    root = source / "sglang" / "srt"
    sampling = dict(_arguments(_class(root / "sampling" / "sampling_params.py", "SamplingParams")))
    for path, file, name, own in CLASSES:
        body = dict(_fields(_class(root / file, name))) | own
        if path == "/generate":
            body["sampling_params"] = sampling | {"max_new_tokens": 4}
        yield path, body


def _class(path: Path, name: str) -> ast.ClassDef:
    tree = ast.parse(path.read_text())
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and field.value is not None and field.target.id not in OWN:
            yield field.target.id, _value(field.value)


def _arguments(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    init = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
    for argument, default in zip(init.args.args[1:], init.args.defaults):
        yield argument.arg, _value(default)


def _value(node: ast.expr) -> Any:
    """A literal, or the default of pydantic's Field(...)."""
    if isinstance(node, ast.Call):
        node = next(keyword.value for keyword in node.keywords if keyword.arg == "default")
    return ast.literal_eval(node)
