"""The forms in which SGLang's releases keep the draft backends' metadata, told apart by what they have.

A family is a multi-step class with three methods of known names and arguments. A release whose class or
arguments are others belongs to no family: it is left alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from .fields import DSA, FA3, NSA, FieldMap, MetadataForm, MissingError, UnsupportedError

Method = Callable[..., Any]


@dataclass(frozen=True)
class Family:
    """One form. `methods` maps what is hooked to the arguments that it must take after `self`."""

    name: str
    module: str
    wrapper: str  # the multi-step class
    backend: str  # the class of its attn_backends
    prefix: str  # of field and method names: nsa | dsa | fa3
    fields: FieldMap
    needs: tuple[str, ...]  # methods of the backend that the plugin calls
    methods: dict[str, tuple[str, ...]]
    in_graph: tuple[str, ...]  # where the captured draft function begins: methods to hook for in_graph
    capture: Callable[[Method, Any, Any], None]  # (SGLang's method, wrapper, batch)
    replay: Callable[[Method, Any, Any, int], None]  # (SGLang's method, wrapper, batch, bs)
    refresh: Callable[[Installed, Any, Any, int], None]  # (installed, wrapper, batch, bs)
    capture_method: str
    replay_method: str


def _capture_f1(method: Method, wrapper: Any, batch: Any) -> None:
    method(wrapper, batch)


def _replay_f1(method: Method, wrapper: Any, batch: Any, bs: int) -> None:
    method(wrapper, batch, bs)


def _capture_f2(method: Method, wrapper: Any, batch: Any) -> None:
    method(wrapper, batch, in_capture=True)


def _replay_f2(method: Method, wrapper: Any, batch: Any, bs: int) -> None:
    method(wrapper, batch)


def _refresh_each(installed: Installed, wrapper: Any, batch: Any, bs: int) -> None:
    for backend in wrapper.attn_backends:
        backend.init_forward_metadata_replay_cuda_graph(
            bs=bs,
            req_pool_indices=batch.req_pool_indices,
            seq_lens=batch.seq_lens,
            seq_lens_sum=batch.seq_lens_sum,
            encoder_lens=None,
            forward_mode=installed.module.ForwardMode.DECODE,
            spec_info=batch.spec_info,
            seq_lens_cpu=batch.seq_lens_cpu,
            out_cache_loc=None,
        )


def _refresh_by_replay(installed: Installed, wrapper: Any, batch: Any, bs: int) -> None:
    """Of fewer than three backends each refreshes its derived fields; where there are none, of any number."""
    installed.replay(wrapper, batch, bs)


_OUT_GRAPH = {  # 0.5.13 and later
    "name": "out_graph",
    "methods": {
        "init_cuda_graph_state": ("max_bs", "max_num_tokens"),
        "init_forward_metadata_out_graph": ("forward_batch", "in_capture"),
        "init_forward_metadata_in_graph": ("forward_batch",),
    },
    "in_graph": (),
    "capture": _capture_f2,
    "replay": _replay_f2,
    "capture_method": "init_forward_metadata_out_graph",
    "replay_method": "init_forward_metadata_out_graph",
}
_CAPTURE_REPLAY = {  # up to 0.5.12.post1
    "name": "capture_replay",
    "methods": {
        "init_cuda_graph_state": ("max_bs", "max_num_tokens"),
        "init_forward_metadata_capture_cuda_graph": ("forward_batch",),
        "init_forward_metadata_replay_cuda_graph": ("forward_batch", "bs"),
    },
    "in_graph": (
        "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker.draft_forward",
        "sglang.srt.speculative.eagle_worker.EAGLEWorker.draft_forward",
    ),
    "capture": _capture_f1,
    "replay": _replay_f1,
    "capture_method": "init_forward_metadata_capture_cuda_graph",
    "replay_method": "init_forward_metadata_replay_cuda_graph",
}
_FLASH_ATTENTION = {
    "module": "sglang.srt.layers.attention.flashattention_backend",
    "wrapper": "FlashAttentionMultiStepBackend",
    "backend": "FlashAttentionBackend",
    "prefix": "fa3",
    "fields": FA3,
    "needs": (),
    "refresh": _refresh_by_replay,
}

# What a kind of backend is called in SGLANG_NSA_PLUGIN_BACKENDS -> its forms.
FAMILIES = {
    "nsa": (
        Family(
            module="sglang.srt.layers.attention.dsa_backend",
            wrapper="DeepseekSparseAttnMultiStepBackend",
            backend="DeepseekSparseAttnBackend",
            prefix="dsa",
            fields=DSA,
            needs=("set_dsa_prefill_impl",),
            refresh=_refresh_by_replay,
            **_OUT_GRAPH,
        ),
        Family(
            module="sglang.srt.layers.attention.nsa_backend",
            wrapper="NativeSparseAttnMultiStepBackend",
            backend="NativeSparseAttnBackend",
            prefix="nsa",
            fields=NSA,
            needs=("set_nsa_prefill_impl",),
            refresh=_refresh_each,
            **_CAPTURE_REPLAY,
        ),
    ),
    "fa3": (Family(**_FLASH_ATTENTION, **_OUT_GRAPH), Family(**_FLASH_ATTENTION, **_CAPTURE_REPLAY)),
}


@dataclass(frozen=True)
class Installed:
    """The installed SGLang's family, its classes, and its own methods before any hook."""

    family: Family
    module: ModuleType
    wrapper_class: type
    backend_class: type
    own: dict[str, Method] = field(repr=False)

    def target(self, method: str) -> str:
        return f"{self.family.module}.{self.family.wrapper}.{method}"

    def init_state(self, wrapper: Any, max_bs: int, max_num_tokens: int) -> None:
        self.own["init_cuda_graph_state"](wrapper, max_bs, max_num_tokens)

    def capture(self, wrapper: Any, batch: Any) -> None:
        """SGLang's own planning of a batch size, of all backends of `wrapper`."""
        self.family.capture(self.own[self.family.capture_method], wrapper, batch)

    def replay(self, wrapper: Any, batch: Any, bs: int) -> None:
        """SGLang's own refresh of all backends of `wrapper`."""
        self.family.replay(self.own[self.family.replay_method], wrapper, batch, bs)

    def refresh(self, wrapper: Any, batch: Any, bs: int) -> None:
        """SGLang's own computation for a wrapper of one or two backends, derived fields included: what its
        multi-step path leaves out up to 0.5.11."""
        self.family.refresh(self, wrapper, batch, bs)

    def form(self, backend: Any) -> MetadataForm:
        return MetadataForm.of(self.family.fields, backend)

    def alias(self, first: Any, backend: Any) -> None:
        """`backend` reads the metadata that `first` has planned last."""
        getattr(backend, f"set_{self.family.prefix}_prefill_impl")(forward_batch=None)
        backend.forward_metadata = first.forward_metadata


def find_installed(kind: str = "nsa") -> Installed:
    """The form in which the installed SGLang has a kind of backend. Raises UnsupportedError with what was
    looked for and not found, MissingError where there is nothing to serve."""
    errors: dict[str, UnsupportedError] = {}
    for family in FAMILIES[kind]:
        try:
            return _probe(family)
        except UnsupportedError as error:
            errors[family.name] = error
    missing = all(isinstance(error, MissingError) for error in errors.values())
    reason = "; ".join(f"{name}: {error}" for name, error in errors.items())
    raise (MissingError if missing else UnsupportedError)(reason)


def _probe(family: Family) -> Installed:
    if importlib.util.find_spec(family.module) is None:
        raise MissingError(f"there is no {family.module}")
    try:
        module = importlib.import_module(family.module)
    except ImportError as error:
        raise MissingError(f"{family.module} does not import: {error}") from error
    classes = []
    for name in (family.wrapper, family.backend):
        found = getattr(module, name, None)
        if not isinstance(found, type):
            raise UnsupportedError(f"{family.module} has no class {name}")
        classes.append(found)
    wrapper_class, backend_class = classes
    own = {name: _own_method(wrapper_class, name, expected) for name, expected in family.methods.items()}
    missing = [name for name in family.needs if not hasattr(backend_class, name)]
    if missing:
        raise UnsupportedError(f"{family.backend} has no {', '.join(missing)}")
    return Installed(family, module, wrapper_class, backend_class, own)


def _own_method(owner: type, name: str, expected: tuple[str, ...]) -> Method:
    method = owner.__dict__.get(name)
    if method is None:
        raise UnsupportedError(f"{owner.__name__} has no {name}")
    method = inspect.unwrap(method)
    found = tuple(inspect.signature(method).parameters)[1:]
    if found != expected:
        raise UnsupportedError(
            f"{owner.__name__}.{name} takes ({', '.join(found)}), not ({', '.join(expected)})"
        )
    return method
