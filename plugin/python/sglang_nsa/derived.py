"""Metadata that follows from the lengths: DeepGEMM's schedule, top-k plans, FlashMLA's tiles.

SGLang refreshes it inside each backend's own refresh. Here it is computed for the first set and copied into
the others, so that none of them stays behind.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .family import Installed, UnsupportedError
from .nsa.kernels import load_kernels

logger = logging.getLogger(__name__)

Stage = Callable[[], None]
PAGE_SIZE = 64  # of DeepGEMM's index cache


def derived_stages(installed: Installed, backend: Any, sets: Sequence[Any]) -> list[Stage]:
    """What refreshes the derived fields of `sets`, metadata of one batch size. Can be captured in a graph."""
    first, others = sets[0], sets[1:]
    stages: list[Stage] = []
    copied: list[str] = []  # fields computed for the first set alone
    if first.paged_mqa_schedule_metadata is not None:
        own_kernel = _schedules_by_kernel(installed, sets)
        stages.append(own_kernel or _schedule_by_deep_gemm(installed, first))
        copied += [] if own_kernel else ["paged_mqa_schedule_metadata"]
    if getattr(first, "topk_v2_plan", None) is not None:
        stages.append(_topk_plan_stage(backend, first))
        copied.append("topk_v2_plan")
    copies = [(getattr(other, name), getattr(first, name)) for name in copied for other in others]
    if first.flashmla_metadata is not None:
        stages.append(_flashmla_stage(backend, first, installed.family.prefix))
        for other in others:
            copies += [
                (getattr(other.flashmla_metadata, name), getattr(first.flashmla_metadata, name))
                for name in ("flashmla_metadata", "num_splits")
            ]
    for metadata in sets:
        lens_2d = getattr(metadata, "paged_mqa_ctx_lens_2d", None)
        if lens_2d is not None and lens_2d.data_ptr() != metadata.cache_seqlens_int32.data_ptr():
            copies.append((lens_2d, metadata.cache_seqlens_int32.view(lens_2d.shape)))
    if copies:
        targets, sources = ([*side] for side in zip(*copies))
        stages.append(lambda: torch._foreach_copy_(targets, sources))
    return stages


def deep_gemm_schedule(installed: Installed) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """What the installed SGLang calls: [bs, 1] lengths -> [num_sms + 1, 2], int32; and num_sms."""
    module = installed.module
    if hasattr(module, "resolve_paged_mqa_logits_metadata_fn"):
        function, num_sms = module.resolve_paged_mqa_logits_metadata_fn(), module.resolve_num_sms()
    else:
        deep_gemm = getattr(module, "deep_gemm", None) or importlib.import_module("deep_gemm")
        function, num_sms = deep_gemm.get_paged_mqa_logits_metadata, deep_gemm.get_num_sms()
    return lambda lens_2d: function(lens_2d, PAGE_SIZE, num_sms), num_sms


def _schedules_by_kernel(installed: Installed, sets: Sequence[Any]) -> Stage | None:
    """One launch of ours for all sets, if it writes what the installed DeepGEMM does; else None."""
    lengths = sets[0].cache_seqlens_int32  # [bs], int32
    kernels = load_kernels(lengths.device.type)
    reference, num_sms = deep_gemm_schedule(installed)
    split = kernels.find_split(
        reference, batch=lengths.shape[0], next_n=1, num_sms=num_sms, device=lengths.device
    )
    if split is None:
        _log_other_schedule()
        return None
    schedules = [kernels.PagedMQASchedule(m.cache_seqlens_int32, m.paged_mqa_schedule_metadata) for m in sets]
    return kernels.PagedMQASchedulePlan(schedules, split=split).run


@functools.cache
def _log_other_schedule() -> None:
    logger.info("sglang-nsa-plugin: this DeepGEMM divides its work otherwise; its own schedule is used")


def _schedule_by_deep_gemm(installed: Installed, metadata: Any) -> Stage:
    target = metadata.paged_mqa_schedule_metadata  # [num_sms + 1, 2], int32
    lens_2d = metadata.cache_seqlens_int32.view(-1, 1)  # [bs, 1], int32
    compute, _ = deep_gemm_schedule(installed)
    return lambda: target.copy_(compute(lens_2d))


def _topk_plan_stage(backend: Any, metadata: Any) -> Stage:
    refresh = getattr(backend, "_refresh_topk_v2_plan", None)
    if refresh is None:
        raise UnsupportedError("topk_v2_plan is there, but no _refresh_topk_v2_plan")
    return lambda: refresh(metadata)


def _flashmla_stage(backend: Any, metadata: Any, prefix: str) -> Stage:
    """SGLang keeps one buffer of tiles for all batch sizes, so it is written before every replay."""
    tiles, lengths = metadata.flashmla_metadata, getattr(metadata, f"{prefix}_cache_seqlens_int32")
    return lambda: tiles.copy_(backend._compute_flashmla_metadata(cache_seqlens=lengths, seq_len_q=1))
