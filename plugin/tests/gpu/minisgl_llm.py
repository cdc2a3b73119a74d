"""mini-sglang's LLM in a process of its own, for the scripts that minisgl_check.py starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

COMMON = {
    "use_dummy_weight": True,
    "max_seq_len_override": 2048,
    "cuda_graph_bs": [1, 2, 4, 8, 16, 32, 64],
    "num_page_override": 40960,
    "max_running_req": 64,
}


def start_llm(model: str, **arguments: object) -> Any:
    from sglang_nsa.minisgl import install

    mode = install()
    from minisgl.engine.config import EngineConfig
    from minisgl.llm import LLM

    port = 20000 + os.getpid() % 20000  # its own is one for all offline engines of a machine
    EngineConfig.distributed_addr = property(lambda self: f"tcp://127.0.0.1:{port}")

    if arguments.get("page_size", 1) > 1:
        arguments["num_page_override"] = arguments["num_page_override"] // arguments["page_size"]
    llm = LLM(model, **arguments)
    print(f"mode {mode.value}, {type(llm.engine.attn_backend).__name__}", flush=True)
    return llm


def run_part(parts: dict[str, Callable[[str, str, str], None]]) -> None:
    """`SCRIPT PART MODEL CASE OUT`: the result is written to OUT as JSON."""
    part, model, case, out = sys.argv[1:]
    parts[part](model, case, out)
