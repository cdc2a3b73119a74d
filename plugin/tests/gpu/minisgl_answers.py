"""What one mini-sglang LLM answers and what its decode graphs read: `minisgl_answers.py PART MODEL CASE OUT`.

The mode is that of MINISGL_USE_FUSED_COPY.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minisgl_llm import COMMON, run_part, start_llm

# What LLM is given in each case whose inputs are compared.
CASES = {
    "fa": {"attention_backend": "fa"},
    "fa, page 16, few slots": {
        "attention_backend": "fa",
        "page_size": 16,
        "max_running_req": 24,
        "num_page_override": 12000,
    },
    "fa prefill, FlashInfer decode": {"attention_backend": "fa,fi"},
}
# And in each case whose tokens are. With a prefix cache there are so many slots that none is given out twice:
# mini-sglang 20fcd7f gives back slots that a running request reads, where another has the same beginning.
TOKEN_CASES = {
    "fa": {"attention_backend": "fa", "cache_type": "naive"},
    "fa, page 16": {"attention_backend": "fa", "cache_type": "naive", "page_size": 16},
    "fa, prefix cache": {"attention_backend": "fa", "num_page_override": 65536},
    "fa prefill, FlashInfer decode": {"attention_backend": "fa,fi", "cache_type": "naive"},
}


def requests() -> tuple[list[list[int]], list[Any]]:
    """300 prompts of all lengths, every other one with a common beginning; answers of all lengths, too."""
    from minisgl.core import SamplingParams

    rng = random.Random(0)
    shared = [rng.randrange(3, 500) for _ in range(90)]
    prompts, params = [], []
    for number in range(300):
        own = [rng.randrange(3, 500) for _ in range(rng.randrange(2, 200))]
        prompts.append(shared + own if number % 2 else own)
        params.append(
            SamplingParams(temperature=0.0, ignore_eos=number % 3 > 0, max_tokens=rng.randrange(2, 90))
        )
    return prompts, params


class PromptCheck:
    """Counts the tokens that prefills read and that are not of their requests' prompts."""

    def __init__(self, llm: Any) -> None:
        import torch

        self.foreign = torch.zeros((), dtype=torch.int64, device=llm.device)
        self._forward = llm.engine.forward_batch
        llm.engine.forward_batch = self.forward_batch

    def forward_batch(self, batch: Any, sample_args: Any) -> Any:
        import torch

        if batch.is_prefill:
            own = torch.cat([req.input_ids[req.cached_len : req.device_len] for req in batch.reqs])
            own = own.pin_memory().to(batch.input_ids.device, non_blocking=True)
            self.foreign += (own != batch.input_ids).sum()
        return self._forward(batch, sample_args)


def answer_on_one_stream(llm: Any) -> list[list[int]]:
    """All requests at once, mini-sglang's MINISGL_DISABLE_OVERLAP_SCHEDULING set."""
    from minisgl.env import ENV

    ENV.DISABLE_OVERLAP_SCHEDULING.value = True
    answers = [answer["token_ids"] for answer in llm.generate(*requests())]
    ENV.DISABLE_OVERLAP_SCHEDULING.value = False
    return answers


def answer_in_waves(llm: Any) -> list[list[int]]:
    """As many requests at a time as run together: none takes the place of one that ended."""
    prompts, params = requests()
    most = COMMON["max_running_req"]
    waves = [slice(first, first + most) for first in range(0, len(prompts), most)]
    return [answer["token_ids"] for wave in waves for answer in llm.generate(prompts[wave], params[wave])]


def answer_overlapping(llm: Any) -> list[list[int]]:
    """All requests at once, as mini-sglang schedules by default."""
    return [answer["token_ids"] for answer in llm.generate(*requests())]


SCHEDULES = {
    "one stream": answer_on_one_stream,
    "overlapping, 64 at a time": answer_in_waves,
    "overlapping": answer_overlapping,
}


def measure_tokens(model: str, case: str, out: str, schedules: Sequence[str] = ("one stream",)) -> None:
    """The answers under each schedule."""
    import torch

    llm = start_llm(model, **(COMMON | TOKEN_CASES[case]))
    check, results = PromptCheck(llm), {}
    for schedule in schedules:
        torch.cuda.synchronize()
        check.foreign.zero_()
        started = time.monotonic()
        answers = SCHEDULES[schedule](llm)
        results[schedule] = {"answers": answers, "foreign": int(check.foreign)}
        print(f"{sum(map(len, answers))} tokens in {time.monotonic() - started:.1f} s", flush=True)
        Path(out).write_text(json.dumps(results))


def measure_overlapping_tokens(model: str, case: str, out: str) -> None:
    measure_tokens(model, case, out, tuple(SCHEDULES)[1:])


class InputsCheck:
    """Compares, at every replay, what the graph reads with mini-sglang's own tensors for the same batch."""

    def __init__(self, llm: Any) -> None:
        import torch
        from sglang_nsa.minisgl.hooks import find_buffers

        self.llm, self.runner = llm, llm.engine.graph_runner
        self.buffers = find_buffers(self.runner)
        names = [*(field.name for field in self.buffers.fields), "write_tuple"]
        self.different = {name: torch.zeros((), dtype=torch.int64, device=llm.device) for name in names}
        self.replays = self.rows = 0
        self._prepare, self._replay = llm._prepare_batch, self.runner.replay
        llm._prepare_batch, self.runner.replay = self.prepare, self.replay

    def prepare(self, batch: Any) -> Any:
        """On the scheduler's stream: mini-sglang's own tensors, also where ours does without them."""
        from minisgl.scheduler import scheduler

        prepared = self._prepare(batch)
        if batch.is_decode and not hasattr(batch, "positions"):
            batch.positions = scheduler._make_positions(batch, self.llm.device)
            batch.own_mapping = scheduler._make_input_tuple(batch, self.llm.device)
            batch.out_loc = self.llm.engine.page_table[batch.own_mapping]
            if self.buffers.attention is not None:
                self.llm.engine.attn_backend.prepare_metadata(batch)
            own = scheduler._make_write_tuple(batch, self.llm.device)
            batch.own_write, batch.write = own, prepared.write_tuple
        return prepared

    def replay(self, batch: Any) -> Any:
        """On the engine's stream."""
        if hasattr(batch, "own_mapping"):
            batch.input_ids = self.llm.token_pool[batch.own_mapping]
        logits = self._replay(batch)
        bs = batch.padded_size
        for field, own in zip(self.buffers.fields, self.buffers.sources()(batch), strict=True):
            found = self.buffers.tensor(field)
            if field.is_table:  # beyond a row's pages mini-sglang copies what nobody reads
                found = found[:bs, : own.shape[1]]
                lens = batch.attn_metadata.cache_seqlens[:, None]
                page_size = self.llm.engine.ctx.page_size
                live = own.new_tensor(range(own.shape[1]))[None, :] * page_size < lens
                wrong = (found != own) & live
            else:
                wrong = found[: bs + field.extra] != own
            self.different[field.name] += wrong.sum()
        if hasattr(batch, "own_write"):
            for ours, own in zip(batch.write, batch.own_write, strict=True):
                self.different["write_tuple"] += (ours != own).sum()
        self.replays, self.rows = self.replays + 1, self.rows + batch.size
        return logits


def measure_inputs(model: str, case: str, out: str) -> None:
    """Every replay of 300 requests, all static inputs."""
    llm = start_llm(model, **(COMMON | CASES[case]))
    check = InputsCheck(llm)
    llm.generate(*requests())
    different = {name: int(count) for name, count in check.different.items()}
    Path(out).write_text(json.dumps({"replays": check.replays, "rows": check.rows, "different": different}))


PARTS = {"inputs": measure_inputs, "tokens": measure_tokens, "tokens-overlapping": measure_overlapping_tokens}


if __name__ == "__main__":
    run_part(PARTS)
