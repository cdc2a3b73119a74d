"""A scheduler over `HistoryWorker` in process, and what it has answered."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from history_worker import HistoryWorker, Sampling, continuation
from sglang.srt.managers.io_struct import (
    BatchOutput,
    ReqOutput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_link import LocalLink
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

MAX_STEPS = 5000


@dataclass
class Result:
    """All that a request's outputs said, put together."""

    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[Any] = field(default_factory=list)
    input_logprobs: list[Any] | None = None
    output_token_sources: list[int] = field(default_factory=list)
    messages: int = 0
    last: ReqOutput | None = None

    @property
    def finish_reason(self) -> dict[str, Any] | None:
        return self.last and self.last.finish_reason


class Harness:
    """A scheduler in process, and what it has answered."""

    def __init__(
        self,
        worker: HistoryWorker | None = None,
        chunked_prefill_size: int = -1,
        disable_radix_cache: bool = False,
        tokenizer: Any = None,
        **args: Any,
    ) -> None:
        self.worker = worker or HistoryWorker()
        self.link = LocalLink()
        args = ServerArgs(
            model_path="none",
            device="cpu",
            chunked_prefill_size=chunked_prefill_size,
            disable_radix_cache=disable_radix_cache,
            **args,
        )
        self.scheduler = Scheduler(args, self.worker, self.link, tokenizer)
        self.results: dict[str, Result] = {}
        self.answers: list[Any] = []

    def send(self, prompt: list[int], rid: str | None = None, **options: Any) -> str:
        rid = rid or f"r{len(self.results)}"
        names = TokenizedGenerateReqInput.__struct_fields__
        own = {name: options.pop(name) for name in names if name in options}
        params = SamplingParams(**({"temperature": 0, "max_new_tokens": 8} | options))
        self.results[rid] = Result()
        self.link.inbox.append(
            TokenizedGenerateReqInput(rid=rid, input_ids=prompt, sampling_params=params, **own)
        )
        return rid

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.step()
            while self.link.outbox:
                message = self.link.outbox.popleft()
                if isinstance(message, BatchOutput):
                    for output in message.outputs:
                        self.collect(output)
                else:
                    self.answers.append(message)

    def collect(self, output: ReqOutput) -> None:
        result = self.results[output.rid]
        assert result.finish_reason is None, f"{output.rid} goes on after its end"
        result.messages += 1
        result.output_ids += output.output_ids
        result.output_logprobs += output.output_logprobs or []
        result.output_token_sources += output.output_token_sources or []
        if output.input_logprobs is not None:
            assert result.input_logprobs is None, "prompt logprobs are sent once"
            result.input_logprobs = output.input_logprobs
        result.last = output

    def finish(self) -> None:
        """Runs until nothing is left to do."""
        for _ in range(MAX_STEPS):
            self.step()
            if self.scheduler.is_idle and not self.link.inbox:
                break
        else:
            raise AssertionError(f"not finished after {MAX_STEPS} steps")
        assert self.scheduler.check_memory() is None
        assert self.scheduler.leak is None
        for result in self.results.values():
            assert result.finish_reason is not None

    def run(self, prompt: list[int], **options: Any) -> Result:
        rid = self.send(prompt, **options)
        self.finish()
        return self.results[rid]


def greedy(prompt: list[int], count: int) -> list[int]:
    return continuation(prompt, Sampling.of(SamplingParams(temperature=0), 0), count, 97)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97), k=length)
