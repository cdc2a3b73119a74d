"""A request of SGLang's native form, prompt by prompt: what /generate and `Engine.generate` share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TypeVar

from sglang.srt.entrypoints.choice import Choice
from sglang.srt.entrypoints.generate_protocol import GenerateReqInput, GenerateSamplingParams
from sglang.srt.entrypoints.serving import LogprobOptions, check_batch
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, new_rid
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.sampling.token_logprob import MAX_TOP_LOGPROBS

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One prompt of a batch with what belongs to it."""

    body: GenerateReqInput
    prompt: str | list[int]
    sampling: GenerateSamplingParams
    params: SamplingParams  # one object for all prompts that share it
    rid: str
    logprobs: LogprobOptions

    @property
    def n(self) -> int:
        return self.sampling.n or 1

    def choice(self, number: int, ids: list[int], params: SamplingParams) -> Choice:
        """The number-th of its n. Raises RequestError (400)."""
        start = self.logprobs.logprob_start_len
        if start >= len(ids):
            message = f"logprob_start_len {start} is not in [-1, {len(ids)}), the prompt's length"
            raise RequestError.bad(message, "logprob_start_len")
        sequence = TokenizedGenerateReqInput(
            rid=new_rid(),
            input_ids=ids,
            sampling_params=params,
            choice=number,
            stream=bool(self.body.stream),
            return_token_sources=bool(self.body.return_token_sources),
            **asdict(self.logprobs),
        )
        own = self.rid + (f"_n{number}" if number else "")
        whole = [self.body.rid] if isinstance(self.body.rid, str) else []
        return Choice(sequence, own, frozenset([own, self.rid, *whole]))


def items(body: GenerateReqInput) -> list[Item]:
    """A value that is given once goes to every prompt. Raises RequestError (400)."""
    prompts, param = body.prompts, body.prompt_name
    count = len(prompts)
    if not prompts:
        raise RequestError.bad(f"{param} must hold at least one prompt", param)
    bodies = _per_prompt(body.sampling_params or GenerateSamplingParams(), count, "sampling_params")
    check_batch(sum(one.n or 1 for one in bodies), 1, param)
    made = {id(one): one.sampling_params(one.max_new_tokens) for one in {id(b): b for b in bodies}.values()}
    params = [made[id(one)] for one in bodies]
    rids = _per_prompt(new_rid() if body.rid is None else body.rid, count, "rid")
    if not isinstance(body.rid, list) and count > 1:
        rids = [f"{rid}_{i}" for i, rid in enumerate(rids)]
    if len(set(rids)) < count:
        raise RequestError.bad("rid must not hold the same rid twice", "rid")
    flags = _per_prompt(body.return_logprob or False, count, "return_logprob")
    start = -1 if body.logprob_start_len is None else body.logprob_start_len
    starts = _per_prompt(start, count, "logprob_start_len")
    tops = _per_prompt(body.top_logprobs_num or 0, count, "top_logprobs_num")
    options = map(_logprob_options, flags, starts, tops)
    return [Item(body, *values) for values in zip(prompts, bodies, params, rids, options)]


def _per_prompt(value: T | list[T], count: int, name: str) -> list[T]:
    """One value for each prompt."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError.bad(f"{name} has {len(value)} values for {count} prompts", name)
    return value


def _logprob_options(flag: bool, start: int, top: int) -> LogprobOptions:
    if start < -1:
        raise RequestError.bad(f"logprob_start_len must be at least -1, got {start}", "logprob_start_len")
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        message = f"top_logprobs_num must be in [0, {MAX_TOP_LOGPROBS}], got {top}"
        raise RequestError.bad(message, "top_logprobs_num")
    return LogprobOptions(flag, start if flag else -1, top if flag else 0)
