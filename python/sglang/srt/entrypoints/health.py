"""Whether the model can still generate: the strictest of the health checks."""

from __future__ import annotations

import asyncio

from sglang.srt.entrypoints.choice import Choice
from sglang.srt.entrypoints.serving import collect
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, new_rid
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams

TIMEOUT = 20.0  # seconds


async def generate_one_token(manager: TokenizerManager) -> None:
    """Raises RequestError (503) where it does not come in time."""
    params = SamplingParams(max_new_tokens=1, temperature=0)
    request = TokenizedGenerateReqInput(rid=new_rid(), input_ids=[0], sampling_params=params)
    generation = await manager.generate([request], [[request.rid]])
    try:
        await asyncio.wait_for(collect(generation, [Choice(request, request.rid)]), TIMEOUT)
    except asyncio.TimeoutError:
        raise RequestError(503, f"no token was generated within {TIMEOUT:.0f} s") from None
    finally:
        generation.close()
