"""What is known of a server before anything is written: when its draft backends must not share metadata, and
whether its requests hold whole pages."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from .family import Installed, UnsupportedError
from .fields import FieldMap, attribute


def require_supported(installed: Installed, wrapper: Any, server_args: Any) -> None:
    """Raises UnsupportedError with the reason."""
    backends = wrapper.attn_backends
    if type(wrapper) is not installed.wrapper_class:
        raise UnsupportedError(f"the multi-step backend is a {type(wrapper).__name__}")
    foreign = [type(b).__name__ for b in backends if type(b) is not installed.backend_class]
    if foreign:
        raise UnsupportedError(f"the draft backends are wrapped or replaced: {', '.join(foreign)}")
    topk = max(getattr(owner, "topk", 1) for owner in (wrapper, *backends))
    if topk > 1:
        raise UnsupportedError(f"drafts are trees (topk {topk})")
    if torch.version.hip is not None:
        raise UnsupportedError("the device is an AMD GPU")
    device = backends[0].req_to_token.device.type
    if device not in ("cpu", "cuda"):
        raise UnsupportedError(f"the device is {device}")
    if any(b.req_to_token.data_ptr() != backends[0].req_to_token.data_ptr() for b in backends):
        raise UnsupportedError("the draft backends have token tables of their own")
    _require_known(installed.family.fields, backends)
    overlap = _setting(server_args, "overlap.enable_two_batch_overlap")
    if overlap is None:
        raise UnsupportedError("no setting says whether two-batch overlap splits the draft batch")
    if overlap:
        raise UnsupportedError("two-batch overlap splits the draft batch")
    graph_backend = _decode_graph_backend(server_args)
    if graph_backend not in (None, "full"):
        raise UnsupportedError(f"decode graphs are {graph_backend}")


def holds_whole_pages(allocator: Any, page_size: int) -> bool:
    """Whether requests hold whole pages of `page_size` slots in `req_to_token`.

    SGLang's paged allocator gives them: a prefix in the cache ends with a page, and what is allocated later,
    a chain of drafts too, goes on where its request ends. It is not known of an allocator that derives from
    it, or has pages of another size (HiSparse, interleaved pages, context-parallel decode).
    """
    kind = type(allocator)
    return (
        kind.__name__ == "PagedTokenToKVPoolAllocator"
        and kind.__module__.startswith("sglang.srt.mem_cache.allocator")
        and allocator.page_size == page_size
    )


def _require_known(fields: FieldMap, backends: list[Any]) -> None:
    for index, backend in enumerate(backends):
        for path, reason in fields.left_alone.items():
            if attribute(backend, path):
                raise UnsupportedError(f"{reason} ({path})")
        if fields.by_step and backend.speculative_step_id != index:
            raise UnsupportedError(f"draft backend {index} is of step {backend.speculative_step_id}")


def _decode_graph_backend(server_args: Any) -> str | None:
    """How decode graphs are captured; None where this SGLang knows one way only."""
    if _setting(server_args, "graph.enable_breakable_cuda_graph"):
        return "breakable"
    backend = attribute(_setting(server_args, "graph.cuda_graph_config"), "decode.backend")
    return None if backend is None else str(getattr(backend, "value", backend)).lower()


def _setting(server_args: Any, path: str) -> Any:
    """A setting as the server resolved it, None if there is none of this name. From 0.5.19 on the arguments
    stay as the user gave them, and what counts is in the process's context, at `path`."""
    try:
        resolved = importlib.import_module("sglang.srt.runtime_context").get_exec()
    except (ImportError, AttributeError, ValueError):  # an earlier release, or nothing is published yet
        resolved = None
    found = attribute(resolved, path)
    return attribute(server_args, path.rpartition(".")[2]) if found is None else found
