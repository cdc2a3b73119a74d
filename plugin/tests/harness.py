"""What surrounds SGLang's real classes in the tests: the draft graph runner, stand-ins for GPU calls."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
from sglang_nsa import hooks
from sglang_nsa.family import Installed
from sglang_nsa.own_path import Batch
from sglang_nsa.real_classes import (
    SERVER_ARGS,
    Sizes,
    StaticBuffers,
    set_attributes,
    slot_allocator,
    token_table,
)

DEVICE = torch.device(os.environ.get("PLUGIN_TEST_DEVICE", "cpu"))
# On a GPU nothing is replaced, and the comparisons alone are run: gpu/other_release.py.
ON_GPU = DEVICE.type == "cuda"


def model_runner(sizes: Sizes, **server_args: Any) -> SimpleNamespace:
    return SimpleNamespace(
        sizes=sizes,
        req_to_token=token_table(sizes, DEVICE),
        token_to_kv_pool_allocator=slot_allocator(sizes, DEVICE),
        server_args=SimpleNamespace(**vars(SERVER_ARGS) | server_args),
        kv_index_translator=None,
    )


def replace_constructor(monkeypatch: Any, installed: Installed) -> None:
    """The wrapper is built by its own constructor; a backend's asks for a GPU and a whole model."""

    def construct(backend: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
        step = kwargs.get("speculative_step_id", 0)
        set_attributes(installed, backend, runner.sizes, runner.req_to_token, step)

    monkeypatch.setattr(installed.backend_class, "__init__", construct)


class Runner:
    """What EAGLEDraftCudaGraphRunner does with its static buffers around the wrapper's three methods."""

    def __init__(self, installed: Installed, wrapper: Any, max_bs: int) -> None:
        self.installed, self.wrapper = installed, wrapper
        self.buffers = StaticBuffers(installed, max_bs, DEVICE)
        self.captured: dict[int, Batch] = {}
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        wrapper.init_cuda_graph_state(max_bs, max_bs)

    def capture(self, bs: int) -> None:
        static = self.captured[bs] = self.buffers.view(bs)
        family = self.installed.family
        family.capture(getattr(type(self.wrapper), family.capture_method), self.wrapper, static)
        self.begin_graph(bs)  # the warm-up
        if ON_GPU:
            self.graphs[bs] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[bs]):
                self.seq_lens_sum = static.seq_lens.sum()  # a graph must not be empty
                self.begin_graph(bs)
        else:
            self.begin_graph(bs)

    def begin_graph(self, bs: int) -> None:
        """The beginning of the captured draft function, as each family has it."""
        if hasattr(self.wrapper, "init_forward_metadata_in_graph"):
            self.wrapper.init_forward_metadata_in_graph(self.captured[bs])
        else:
            worker = SimpleNamespace(draft_attn_backend=self.wrapper)
            hooks.draft_forward(lambda worker, batch: None, worker, self.captured[bs])

    def run_graph(self, bs: int) -> None:
        """What a replay of the captured draft graph begins with."""
        draft = hooks.draft_metadata_of(self.wrapper)
        if ON_GPU:
            self.graphs[bs].replay()
        elif draft.layout == "in_graph":
            draft._plans[bs].run()

    def replay(self, batch: Batch, bs: int) -> None:
        """Replays at the captured size bs >= the batch's."""
        family = self.installed.family
        replay = getattr(type(self.wrapper), family.replay_method)
        family.replay(replay, self.wrapper, self.buffers.set(batch, bs), bs)


FUSED_COPY_MODULES = (
    "sglang.jit_kernel.fused_metadata_copy",
    "sglang.kernels.ops.attention.fused_metadata_copy",
    "sglang.kernels.ops.attention.dsa.fused_metadata_copy",
)


def replace_fused_copy(monkeypatch: Any, library: Any | None) -> None:
    """SGLang compiles its fused copy for a GPU at first use. Without one it copies tensor by tensor instead
    (library None); or a library's calls for CPU tensors stand in for it."""
    if ON_GPU:
        return

    def missing(*args: Any) -> None:
        raise ImportError("no GPU")

    for name in FUSED_COPY_MODULES:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            continue
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        for function in ("fused_metadata_copy_cuda", "fused_metadata_copy_multi_cuda"):
            monkeypatch.setattr(module, function, getattr(library, function) if library else missing)


NUM_SMS = 7


def replace_deep_gemm(monkeypatch: Any, installed: Installed) -> None:
    """The branches for CUDA, with DeepGEMM's schedule computed in plain torch."""
    if ON_GPU:
        return
    from sglang_nsa.nsa.schedules import paged_mqa_logits_schedule

    deep_gemm = SimpleNamespace(
        get_paged_mqa_logits_metadata=lambda lens, block, sms: paged_mqa_logits_schedule(lens, sms),
        get_num_sms=lambda: NUM_SMS,
    )
    module = installed.module
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm)
    monkeypatch.setattr(module, "is_cuda", lambda: True)
    monkeypatch.setattr(module, "deep_gemm", deep_gemm, raising=False)  # imported where there is a GPU
    if hasattr(module, "resolve_paged_mqa_logits_metadata_fn"):
        function = deep_gemm.get_paged_mqa_logits_metadata
        monkeypatch.setattr(module, "resolve_paged_mqa_logits_metadata_fn", lambda: function)
        monkeypatch.setattr(module, "resolve_num_sms", deep_gemm.get_num_sms)


def replace_flashmla(monkeypatch: Any, installed: Installed) -> None:
    """FlashMLA's tiles: they depend on the number of rows alone."""
    if ON_GPU:
        return
    kind = getattr(installed.module, f"{installed.family.prefix.upper()}FlashMLAMetadata")

    def compute(backend: Any, cache_seqlens: torch.Tensor, seq_len_q: int) -> Any:
        rows = cache_seqlens.shape[0]
        tiles = torch.arange(4 * 8, dtype=torch.int32).view(4, 8) * rows
        return kind(tiles, torch.arange(rows + 1, dtype=torch.int32) * (rows + 1))

    monkeypatch.setattr(installed.backend_class, "_compute_flashmla_metadata", compute)
