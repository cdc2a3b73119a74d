"""Fused metadata kernels for NSA models with MTP speculative decoding, on the CPU and on CUDA.

Importing this package loads nothing; the compiled library of a device is loaded when it is first needed.
"""

from ._library import ABI_VERSION, available, load_error
from .decode_inputs import DecodeInputsPlan
from .fused_metadata import (
    CopyRegion,
    FusedMetadataCopyPlan,
    MetadataDestination,
    NSAMetadataGeneratePlan,
    fused_metadata_copy_cuda,
    fused_metadata_copy_multi_cuda,
)
from .index_scores import index_scores, serves_index_scores
from .paged_mqa_schedule import (
    DEEP_GEMM_SPLITS,
    PagedMQASchedule,
    PagedMQASchedulePlan,
    PagedMQASplit,
    find_split,
)
from .replay_copy import ReplayCopyPlan, ReplayField, fused_copy_replay_data
from .replays import bind_copy, bind_generate, bind_generate_and_copy, bind_replay_copy
from .topk_slots import topk_slots

__all__ = [
    "ABI_VERSION",
    "DEEP_GEMM_SPLITS",
    "CopyRegion",
    "DecodeInputsPlan",
    "FusedMetadataCopyPlan",
    "MetadataDestination",
    "NSAMetadataGeneratePlan",
    "PagedMQASchedule",
    "PagedMQASchedulePlan",
    "PagedMQASplit",
    "ReplayCopyPlan",
    "ReplayField",
    "available",
    "bind_copy",
    "bind_generate",
    "bind_generate_and_copy",
    "bind_replay_copy",
    "find_split",
    "fused_copy_replay_data",
    "fused_metadata_copy_cuda",
    "fused_metadata_copy_multi_cuda",
    "index_scores",
    "load_error",
    "serves_index_scores",
    "topk_slots",
]
