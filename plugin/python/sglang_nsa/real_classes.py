"""The installed SGLang's real multi-step wrapper and backends, without a model: for `bench` and the tests.

A backend's own constructor asks for a model runner with weights. Here its attributes are set directly: those
that the metadata's methods read. Every method that runs is SGLang's.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .family import Installed
from .own_path import Batch, decode_batch

SERVER_ARGS = SimpleNamespace(enable_two_batch_overlap=False)  # as far as the plugin asks


@dataclass(frozen=True)
class Sizes:
    """Of DeepSeek-V3.2, but for the memory; a dense model leaves its last four unread."""

    context_len: int = 512
    pool: int = 80  # requests that req_to_token holds
    page_size: int = 64
    draft_tokens: int = 8
    topk: int = 2048  # index_topk
    num_heads: int = 128
    decode: str = "flashmla_sparse"  # or flashmla_kv


def token_table(sizes: Sizes, device: torch.device) -> torch.Tensor:  # [pool, width], int32
    """Whole pages, as SGLang's paged allocator gives them."""
    width, page_size = sizes.context_len + 4 + sizes.draft_tokens, sizes.page_size
    shape = sizes.pool, -(-width // page_size), 1
    pages = torch.randint(0, (1 << 20) // page_size, shape, generator=torch.Generator().manual_seed(0))
    slots = (pages * page_size + torch.arange(page_size)).flatten(1)
    return slots[:, :width].int().contiguous().to(device)


def slot_allocator(sizes: Sizes, device: torch.device) -> Any:
    """What a server of this page size has; it owns no memory of keys."""
    module = importlib.import_module("sglang.srt.mem_cache.allocator")
    size = sizes.pool * sizes.page_size
    if sizes.page_size == 1:
        return module.TokenToKVPoolAllocator(size, torch.bfloat16, str(device), None, need_sort=False)
    return module.PagedTokenToKVPoolAllocator(
        size, sizes.page_size, torch.bfloat16, str(device), None, need_sort=False
    )


def set_attributes(
    installed: Installed, backend: Any, sizes: Sizes, req_to_token: torch.Tensor, step: int = 0
) -> None:
    """What SGLang's constructor would have set, as far as metadata depends on it."""
    if installed.family.prefix == "fa3":
        _set_dense_attributes(backend, sizes, req_to_token, step)
    else:
        _set_sparse_attributes(installed, backend, sizes, req_to_token)


def _set_dense_attributes(backend: Any, sizes: Sizes, req_to_token: torch.Tensor, step: int) -> None:
    vars(backend).update(
        {
            "device": str(req_to_token.device),
            "page_size": sizes.page_size,
            "max_context_len": sizes.context_len,
            "max_num_pages": -(-sizes.context_len // sizes.page_size),
            "req_to_token": req_to_token,
            "req_to_token_pool": SimpleNamespace(req_to_token=req_to_token, size=sizes.pool),
            "token_to_kv_pool": None,
            "topk": 1,
            "speculative_step_id": step,
            "speculative_num_steps": sizes.draft_tokens - 1,
            "speculative_num_draft_tokens": sizes.draft_tokens,
            "decode_cuda_graph_metadata": {},
            "target_verify_metadata": {},
            "forward_metadata": None,
            "forward_metadata_spec_decode_expand": None,
            "use_mla": False,
            "use_sliding_window_kv_pool": False,
            "has_swa": False,
            "is_prefill_aware_swa": False,
            "has_local_attention": False,
            "local_attn_builder": None,
            "is_encoder_decoder": False,
            "is_draft_runner": True,
            "skip_prefill": False,
            "needs_cpu_seq_lens": False,
            "fa_impl_ver": 3,
            "kv_index_translator": _index_translator(sizes, req_to_token),
            "kv_read_tables": None,
            "_get_scheduler_metadata": None,
            "_verify_mask": None,
            "_kv_shard_pool": None,
            "_unified_dense": False,
            "_unified_hooks": SimpleNamespace(enabled=False, v2p_page_table=None, kernel_page_multiplier=1),
        }
    )


def _index_translator(sizes: Sizes, req_to_token: torch.Tensor) -> Any:
    """SGLang's own, where there is one (0.5.19 and later)."""
    try:
        module = importlib.import_module("sglang.srt.mem_cache.kv_index_translator")
    except ImportError:
        return None
    return module.KVIndexTranslator(
        req_to_token=req_to_token,
        token_to_kv_pool_allocator=None,
        token_to_kv_pool=None,
        page_size=sizes.page_size,
        device=str(req_to_token.device),
    )


def _set_sparse_attributes(
    installed: Installed, backend: Any, sizes: Sizes, req_to_token: torch.Tensor
) -> None:
    module, p = installed.module, installed.family.prefix
    device = req_to_token.device
    on_cuda = device.type == "cuda"
    vars(backend).update(
        {
            "device": str(device),
            "real_page_size": sizes.page_size,
            "physical_page_size": sizes.page_size,
            "max_context_len": sizes.context_len,
            "req_to_token": req_to_token,
            "req_to_token_pool": SimpleNamespace(req_to_token=req_to_token, size=sizes.pool),
            "speculative_num_draft_tokens": sizes.draft_tokens,
            f"{p}_index_topk": sizes.topk,
            f"{p}_decode_impl": sizes.decode,
            f"{p}_prefill_impl": "flashmla_sparse",
            f"{p}_kv_cache_store_fp8": sizes.decode == "flashmla_kv",
            "enable_auto_select_prefill_impl": False,
            "flashmla_kv_num_q_heads": sizes.num_heads,
            "num_q_heads": sizes.num_heads,
            "flashmla_kv_format": "V32",
            "device_sm_major": torch.cuda.get_device_capability(device)[0] if on_cuda else 0,
            "use_mha": False,
            "use_fused_topk": True,
            "hisparse_coordinator": None,
            "dsa_topk_backend": _topk_backend(module, on_cuda),
            "dsa_index_kpool": 1,
            "_arange_buf": torch.arange(16384, dtype=torch.int32, device=device),
            "forward_metadata": None,
            "token_to_kv_pool": None,
            "_kv_shard_pool": None,
            "_multi_ctas_kv_counter_buffer": None,
            "_is_in_breakable_cuda_graph": lambda: False,
            "_is_in_tc_piecewise_cuda_graph": lambda: False,
            "_get_device_sm": lambda: 90,
            "_is_blackwell": lambda: False,
        }
    )
    adapter = getattr(module, "TorchMemorySaverAdapter", None)
    if adapter is not None:
        backend._memory_saver_adapter = adapter.create(enable=False)
    if on_cuda and hasattr(backend, "_init_kpool_metadata_fusion"):
        backend._init_kpool_metadata_fusion()


def _topk_backend(module: Any, on_cuda: bool) -> Any:
    kind = getattr(module, "DSATopKBackend", None)
    return kind("sgl-kernel") if kind and on_cuda else SimpleNamespace(should_use_topk_v2=lambda: False)


def build_wrapper(installed: Installed, sizes: Sizes, req_to_token: torch.Tensor, steps: int) -> Any:
    """A wrapper of steps - 1 backends."""
    wrapper = installed.wrapper_class.__new__(installed.wrapper_class)
    vars(wrapper).update(topk=1, speculative_num_steps=steps, attn_backends=[], model_runner=None)
    for step in range(steps - 1):
        backend = installed.backend_class.__new__(installed.backend_class)
        set_attributes(installed, backend, sizes, req_to_token, step)
        wrapper.attn_backends.append(backend)
    return wrapper


class StaticBuffers:
    """The buffers of EAGLEDraftCudaGraphRunner that metadata is computed from."""

    def __init__(self, installed: Installed, max_bs: int, device: torch.device) -> None:
        self.installed = installed
        self.dtype = torch.int32 if installed.family.name == "capture_replay" else torch.int64
        self.seq_lens = torch.ones(max_bs, dtype=self.dtype, device=device)
        self.req_pool_indices = torch.zeros(max_bs, dtype=torch.int64, device=device)
        self.seq_lens_cpu = torch.ones(max_bs, dtype=torch.int64)

    def view(self, bs: int) -> Batch:
        """The batch at captured size bs."""
        return decode_batch(
            self.seq_lens[:bs],
            self.req_pool_indices[:bs],
            self.seq_lens_cpu[:bs],
            self.installed.module.ForwardMode.DECODE,
        )

    def set(self, batch: Batch, bs: int) -> Batch:
        """Copies a batch in, padded to bs, and returns what the runner hands on: its own views if padded."""
        raw = batch.batch_size
        if raw != bs:
            self.seq_lens.fill_(1)
            self.req_pool_indices.zero_()
            self.seq_lens_cpu.fill_(1)
        self.seq_lens[:raw] = batch.seq_lens
        self.req_pool_indices[:raw] = batch.req_pool_indices
        self.seq_lens_cpu[:raw] = batch.seq_lens_cpu
        return batch if raw == bs else self.view(bs)


def make_batch(installed: Installed, lengths: Any, indices: Any, device: torch.device | str = "cpu") -> Batch:
    """A batch in tensors of its own, as the scheduler hands it to the runner."""
    seq_lens = torch.as_tensor(lengths)
    return decode_batch(
        seq_lens.to(device),
        torch.as_tensor(indices).to(device),
        seq_lens.cpu().clone(),
        installed.module.ForwardMode.DECODE,
    )
