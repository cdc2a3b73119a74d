"""SGLang's real multi-step wrapper and backends over CPU tensors.

The wrapper is built by its own constructor. A backend's constructor asks for a GPU and a whole model, so that
alone is replaced, by one that sets the attributes which the metadata's methods read.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import torch
from sglang_nsa.family import Installed
from sglang_nsa.own_path import Batch, decode_batch

DRAFT_TOKENS = 8


def model_runner(
    *, context_len: int = 512, pool: int = 80, page_size: int = 64, seed: int = 0, **server_args: Any
) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    width = context_len + 4 + DRAFT_TOKENS
    table = torch.randint(0, 1 << 20, (pool, width), generator=generator, dtype=torch.int32)
    return SimpleNamespace(
        device="cpu",
        page_size=page_size,
        context_len=context_len,
        req_to_token_pool=SimpleNamespace(req_to_token=table, size=pool),
        server_args=SimpleNamespace(**server_args),
    )


def replace_constructor(
    monkeypatch: Any, installed: Installed, *, topk: int = 64, decode: str = "flashmla_sparse"
) -> None:
    p = installed.family.prefix

    def construct(backend: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
        module = installed.module
        attributes = {
            "device": runner.device,
            "real_page_size": runner.page_size,
            "physical_page_size": runner.page_size,
            "max_context_len": runner.context_len,
            "req_to_token": runner.req_to_token_pool.req_to_token,
            "req_to_token_pool": runner.req_to_token_pool,
            "speculative_num_draft_tokens": DRAFT_TOKENS,
            f"{p}_index_topk": topk,
            f"{p}_decode_impl": decode,
            f"{p}_prefill_impl": "flashmla_sparse",
            f"{p}_kv_cache_store_fp8": False,
            "enable_auto_select_prefill_impl": False,
            "use_mha": False,
            "use_fused_topk": True,
            "hisparse_coordinator": None,
            "dsa_topk_backend": SimpleNamespace(should_use_topk_v2=lambda: False),
            "dsa_index_kpool": 1,
            "_arange_buf": torch.arange(16384, dtype=torch.int32),
            "forward_metadata": None,
            "token_to_kv_pool": None,
            "_kv_shard_pool": None,
            "_is_in_breakable_cuda_graph": lambda: False,
            "_is_in_tc_piecewise_cuda_graph": lambda: False,
            "_get_device_sm": lambda: 90,
            "_is_blackwell": lambda: False,
        }
        adapter = getattr(module, "TorchMemorySaverAdapter", None)
        if adapter is not None:
            attributes["_memory_saver_adapter"] = adapter.create(enable=False)
        vars(backend).update(attributes)

    monkeypatch.setattr(installed.backend_class, "__init__", construct)


def batch(
    installed: Installed, lengths: list[int] | torch.Tensor, indices: list[int] | torch.Tensor
) -> Batch:
    """A batch of tensors of its own, as the scheduler hands it to the runner."""
    seq_lens = torch.as_tensor(lengths)
    return decode_batch(
        seq_lens, torch.as_tensor(indices), seq_lens.clone(), installed.module.ForwardMode.DECODE
    )


class Runner:
    """What EAGLEDraftCudaGraphRunner does with its static buffers around the wrapper's three methods."""

    def __init__(self, installed: Installed, wrapper: Any, max_bs: int, dtype: torch.dtype) -> None:
        self.installed, self.wrapper = installed, wrapper
        self.seq_lens = torch.ones(max_bs, dtype=dtype)
        self.req_pool_indices = torch.zeros(max_bs, dtype=torch.int64)
        wrapper.init_cuda_graph_state(max_bs, max_bs)

    def _static(self, bs: int, seq_lens_cpu: torch.Tensor) -> Batch:
        return decode_batch(
            self.seq_lens[:bs],
            self.req_pool_indices[:bs],
            seq_lens_cpu,
            self.installed.module.ForwardMode.DECODE,
        )

    def capture(self, bs: int) -> None:
        static = self._static(bs, torch.ones(bs, dtype=torch.int64))
        family = self.installed.family
        family.capture(getattr(type(self.wrapper), family.capture_method), self.wrapper, static)
        for _ in range(2):  # warm-up and capture
            self.run_graph(static)
        self.captured = static

    def run_graph(self, static: Batch) -> None:
        if hasattr(self.wrapper, "init_forward_metadata_in_graph"):
            self.wrapper.init_forward_metadata_in_graph(static)

    def replay(self, batch: Batch, bs: int, unpadded_views: bool = True) -> None:
        """Replays at the captured size bs >= the batch's."""
        raw = batch.batch_size
        if bs != raw:
            self.seq_lens.fill_(1)
            self.req_pool_indices.zero_()
        self.seq_lens[:raw] = batch.seq_lens
        self.req_pool_indices[:raw] = batch.req_pool_indices
        if bs != raw:
            lens = torch.ones(bs, dtype=batch.seq_lens_cpu.dtype)
            lens[:raw] = batch.seq_lens_cpu
            batch = self._static(bs, lens)
        family = self.installed.family
        family.replay(getattr(type(self.wrapper), family.replay_method), self.wrapper, batch, bs)


FUSED_COPY_MODULES = (
    "sglang.jit_kernel.fused_metadata_copy",
    "sglang.kernels.ops.attention.fused_metadata_copy",
    "sglang.kernels.ops.attention.dsa.fused_metadata_copy",
)


def replace_fused_copy(monkeypatch: Any, library: Any | None) -> None:
    """SGLang compiles its fused copy for a GPU at first use. Without one it copies tensor by tensor instead
    (library None); or a library's calls for CPU tensors stand in for it."""

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
    from sglang_nsa.nsa.schedules import paged_mqa_logits_schedule

    deep_gemm = SimpleNamespace(
        get_paged_mqa_logits_metadata=lambda lens, block, sms: paged_mqa_logits_schedule(lens, sms),
        get_num_sms=lambda: NUM_SMS,
    )
    module = installed.module
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm)
    monkeypatch.setattr(module, "is_cuda", lambda: True)
    if hasattr(module, "deep_gemm"):
        monkeypatch.setattr(module, "deep_gemm", deep_gemm)
    if hasattr(module, "resolve_paged_mqa_logits_metadata_fn"):
        function = deep_gemm.get_paged_mqa_logits_metadata
        monkeypatch.setattr(module, "resolve_paged_mqa_logits_metadata_fn", lambda: function)
        monkeypatch.setattr(module, "resolve_num_sms", deep_gemm.get_num_sms)


def replace_flashmla(monkeypatch: Any, installed: Installed) -> None:
    """FlashMLA's tiles: they depend on the number of rows alone."""
    kind = getattr(installed.module, f"{installed.family.prefix.upper()}FlashMLAMetadata")

    def compute(backend: Any, cache_seqlens: torch.Tensor, seq_len_q: int) -> Any:
        rows = cache_seqlens.shape[0]
        tiles = torch.arange(4 * 8, dtype=torch.int32).view(4, 8) * rows
        return kind(tiles, torch.arange(rows + 1, dtype=torch.int32) * (rows + 1))

    monkeypatch.setattr(installed.backend_class, "_compute_flashmla_metadata", compute)
