"""Which worker runs the model."""

from __future__ import annotations

import torch

from sglang.srt.managers.schedule_batch import GenerationWorker
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.eagle_worker import EAGLEWorker


def create_worker(server_args: ServerArgs) -> GenerationWorker:
    """Loads the model and builds the worker that the arguments ask for."""
    dtype = server_args.dtype
    if dtype == "auto" and server_args.device == "cpu":
        dtype = "float32"  # what CPUs without bfloat16 units compute fastest
    if server_args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; --device cpu runs anywhere")
    config = ModelConfig.from_path(
        server_args.model_path, server_args.context_length, dtype, server_args.device
    )
    if server_args.kv_cache_dtype in ("bf16", "bfloat16") and config.dtype != torch.bfloat16:
        raise ValueError(
            f"--kv-cache-dtype {server_args.kv_cache_dtype} needs --dtype bfloat16: "
            f"the cache has the model's type, {config.dtype}"
        )
    if server_args.speculative_algorithm is None:
        return TpModelWorker(server_args, config)
    if not config.num_nextn_predict_layers:
        raise ValueError(
            f"--speculative-algorithm {server_args.speculative_algorithm} needs a model with a NextN layer; "
            f"num_nextn_predict_layers of {server_args.model_path} is 0"
        )
    return EAGLEWorker(server_args, config)
