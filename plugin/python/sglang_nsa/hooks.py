"""The hooks around SGLang's multi-step wrapper. Each wrapper object has a DraftMetadata of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from .counters import Counters
from .draft_metadata import DraftMetadata
from .family import Installed, Method
from .settings import Settings

logger = logging.getLogger(__name__)

_INDEX_SHARE = "seed_dsa_topk_from_draft_extend"  # an argument of the wrapper's constructor
_ATTRIBUTE = "_sglang_nsa_draft_metadata"  # on the wrapper, so that it lives as long


def draft_metadata_of(wrapper: Any) -> DraftMetadata | None:
    return vars(wrapper).get(_ATTRIBUTE)


class Hooks:
    """AROUND hooks: each gets SGLang's method and its arguments."""

    def __init__(self, installed: Installed, settings: Settings, counters: Counters) -> None:
        self.installed, self.settings, self.counters = installed, settings, counters
        family = installed.family
        by_method: dict[str, Callable[..., Any]] = {
            "__init__": self.construct,
            "init_cuda_graph_state": self.init_cuda_graph_state,
            "init_forward_metadata_capture_cuda_graph": self.capture,
            "init_forward_metadata_replay_cuda_graph": self.replay,
            "init_forward_metadata_out_graph": self.out_graph,
            "init_forward_metadata_in_graph": self.in_graph,
        }
        # One function object each, by which an applied hook is recognized.
        self.by_target = {installed.target(name): by_method[name] for name in ("__init__", *family.methods)}
        if settings.layout == "in_graph":
            self.by_target |= dict.fromkeys(family.in_graph, draft_forward)

    def construct(self, original: Method, wrapper: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
        original(wrapper, model_runner, *args, **kwargs)
        if not wrapper.attn_backends:
            return  # adaptive speculation at one step
        missing = self.not_applied()
        if missing:
            reason = f"hooks are not in place: {', '.join(missing)}"
            if self.settings.strict:
                raise SystemExit(f"sglang-nsa-plugin (strict): {reason}")
            logger.warning("sglang-nsa-plugin leaves the draft metadata to SGLang: %s", reason)
            return
        server_args = getattr(model_runner, "server_args", None)
        arguments = dict(zip(("topk", "steps", _INDEX_SHARE), args)) | kwargs
        if arguments.get(_INDEX_SHARE):
            logger.info("sglang-nsa-plugin: IndexShare: the draft steps take over draft-extend's top-k")
        allocator = getattr(model_runner, "token_to_kv_pool_allocator", None)
        draft = DraftMetadata(self.installed, self.settings, wrapper, server_args, self.counters, allocator)
        setattr(wrapper, _ATTRIBUTE, draft)

    def not_applied(self) -> list[str]:
        """Methods of the wrapper class that do not carry our hook."""
        cls = self.installed.wrapper_class
        return [
            name
            for name in self.installed.family.methods
            if not _carries(getattr(cls, name), self.by_target[self.installed.target(name)])
        ]

    def init_cuda_graph_state(self, original: Method, wrapper: Any, max_bs: int, max_num_tokens: int) -> None:
        draft = draft_metadata_of(wrapper)
        if draft is None:
            original(wrapper, max_bs, max_num_tokens)
        else:
            draft.init_state(max_bs, max_num_tokens)

    def capture(self, original: Method, wrapper: Any, forward_batch: Any) -> None:
        draft = draft_metadata_of(wrapper)
        if draft is None:
            original(wrapper, forward_batch)
        else:
            draft.capture(forward_batch)

    def replay(self, original: Method, wrapper: Any, forward_batch: Any, bs: int) -> None:
        draft = draft_metadata_of(wrapper)
        if draft is None:
            original(wrapper, forward_batch, bs)
        else:
            draft.replay(forward_batch, bs)

    def out_graph(self, original: Method, wrapper: Any, forward_batch: Any, in_capture: bool = False) -> None:
        draft = draft_metadata_of(wrapper)
        if draft is None:
            original(wrapper, forward_batch, in_capture=in_capture)
        elif in_capture:
            draft.capture(forward_batch)
        else:
            draft.replay(forward_batch, forward_batch.batch_size)

    def in_graph(self, original: Method, wrapper: Any, forward_batch: Any) -> None:
        original(wrapper, forward_batch)
        draft = draft_metadata_of(wrapper)
        if draft is not None:
            draft.run_in_graph(forward_batch)


def draft_forward(original: Method, worker: Any, forward_batch: Any, *args: Any, **kw: Any) -> Any:
    """`capture_replay` has no place inside the graph: there it is where the draft function begins."""
    wrapper = getattr(worker, "draft_attn_backend", None)
    draft = None if wrapper is None or not hasattr(wrapper, "__dict__") else draft_metadata_of(wrapper)
    if draft is not None:
        draft.run_in_graph(forward_batch)
    return original(worker, forward_batch, *args, **kw)


def _carries(method: Any, hook: Callable[..., Any]) -> bool:
    """Whether a chain of HookRegistry's wrappers has this hook in it."""
    while method is not None:
        cells = getattr(method, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        method = getattr(method, "__wrapped__", None)
    return False
