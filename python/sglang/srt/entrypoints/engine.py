"""Offline use: the whole engine in this process, without HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from sglang.srt.entrypoints.choice import Choice
from sglang.srt.managers.detokenizer import OutputText
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchOutput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    ReqOutput,
    TokenizedGenerateReqInput,
    new_rid,
)
from sglang.srt.managers.scheduler import Scheduler, load_tokenizer
from sglang.srt.managers.scheduler_link import LocalLink
from sglang.srt.managers.worker_factory import create_worker
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

SAMPLING_PARAMS = frozenset(field.name for field in msgspec.structs.fields(SamplingParams))


class Engine:
    """Generates text in this process. Takes the fields of `ServerArgs`; not for several threads at a time.

    with Engine(model_path="models/tiny") as engine:
        print(engine.generate("The capital of", {"max_new_tokens": 16, "temperature": 0})["text"])
    """

    def __init__(self, **server_args: Any) -> None:
        self.server_args = ServerArgs(**server_args)
        self.tokenizer = load_tokenizer(self.server_args.tokenizer_path)
        self.link = LocalLink()
        worker = create_worker(self.server_args)
        self.scheduler = Scheduler(self.server_args, worker, self.link, self.tokenizer)
        self._generations: dict[str, Generation] = {}  # all that are not finished, by rid
        self._answers: dict[str, FlushCacheReqOutput] = {}

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
        return_token_sources: bool = False,
        stream: bool = False,
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Completes one prompt or a list of them, given as text or as token ids.

        With `return_token_sources` each token's source comes along (docs/http_api.md).
        Returns `{"text", "output_ids", "meta_info"}`, or a list of these for a list of prompts. With `stream`
        an iterator over such dicts, each with all text so far, and for a list with the prompt's "index".
        Raises ValueError that names what is wrong with a request; then none of the list is generated.
        """
        if (prompt is None) == (input_ids is None):
            raise ValueError("give either prompt or input_ids")
        prompts: Any = prompt if input_ids is None else input_ids
        single = isinstance(prompts, str) or (input_ids is not None and not _is_nested(prompts))
        prompts = [prompts] if single else prompts
        params = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"sampling_params has {len(params)} entries for {len(prompts)} prompts")
        requests = [
            TokenizedGenerateReqInput(
                rid=new_rid(),
                input_ids=self.tokenizer.encode(one) if isinstance(one, str) else list(one),
                sampling_params=parse_sampling_params(given or {}),
                stream=stream,
                return_logprob=return_logprob,
                logprob_start_len=logprob_start_len if return_logprob else -1,
                top_logprobs_num=top_logprobs_num if return_logprob else 0,
                return_token_sources=return_token_sources,
            )
            for one, given in zip(prompts, params)
        ]
        for request in requests:
            self.scheduler.validate(request)
        chunks = self._stream(requests, single)
        if stream:
            return chunks
        last = {chunk["meta_info"]["id"]: chunk for chunk in chunks}
        results = [last[request.rid] for request in requests]
        for result in results:
            result.pop("index", None)
        return results[0] if single else results

    def flush_cache(self) -> FlushCacheReqOutput:
        """Empties the prefix cache. Not successful, and nothing is changed, while something is generated."""
        request_id = new_rid()
        self.link.inbox.append(FlushCacheReqInput(request_id))
        self._step()
        return self._answers.pop(request_id)

    def get_server_info(self) -> dict[str, Any]:
        """The arguments, and the scheduler's state under `internal_states`."""
        return self.server_args.to_dict() | {"internal_states": [self.scheduler.internal_state()]}

    def shutdown(self) -> None:
        """Gives up what is still generated."""
        self.abort_request(abort_all=True)

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """Ends one request, or all, as they stand; whoever iterates over one gets what was generated."""
        rids = list(self._generations) if abort_all else [rid] if rid in self._generations else []
        if rids:
            self.link.inbox.append(AbortReq(rids))
            self._step()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _stream(self, requests: list[TokenizedGenerateReqInput], single: bool) -> Iterator[dict[str, Any]]:
        """Runs the scheduler until the requests are finished; aborts them if the caller stops before."""
        generations = [Generation.start(r, self.tokenizer) for r in requests]
        self._generations |= {g.rid: g for g in generations}
        self.link.inbox.extend(requests)
        try:
            while any(not g.finished or g.has_news for g in generations):
                for index, generation in enumerate(generations):
                    if generation.has_news:
                        generation.has_news = False
                        yield generation.choice.native() | ({} if single else {"index": index})
                if any(not g.finished for g in generations):
                    self._step()
        finally:
            left = [generation.rid for generation in generations if not generation.finished]
            if left:
                self.link.inbox.append(AbortReq(left))
            for generation in generations:
                self._generations.pop(generation.rid, None)

    def _step(self) -> None:
        self.scheduler.step()
        while self.link.outbox:
            message = self.link.outbox.popleft()
            if isinstance(message, BatchOutput):
                for output in message.outputs:
                    if (generation := self._generations.get(output.rid)) is not None:
                        generation.add(output)
            elif isinstance(message, FlushCacheReqOutput):
                self._answers[message.request_id] = message


@dataclass
class Generation:
    """One sequence with its detokenizer."""

    choice: Choice
    detokenizer: OutputText
    has_news: bool = False  # something has come since the caller was last told

    @classmethod
    def start(cls, request: TokenizedGenerateReqInput, tokenizer: PreTrainedTokenizerBase) -> Generation:
        text = OutputText(tokenizer, request.sampling_params, request.return_token_sources)
        return cls(Choice(request, request.rid), text)

    @property
    def rid(self) -> str:
        return self.choice.request.rid

    @property
    def finished(self) -> bool:
        return self.choice.finish_reason is not None

    def add(self, output: ReqOutput) -> None:
        text = self.detokenizer.feed(output.output_ids, output.finish_reason)
        self.choice.add(output, text, self.detokenizer.take_offsets())
        self.has_news = True


def parse_sampling_params(given: dict[str, Any]) -> SamplingParams:
    """Raises ValueError that names an unknown parameter, or one of the wrong type."""
    if unknown := sorted(given.keys() - SAMPLING_PARAMS):
        raise ValueError(f"unknown sampling parameter {unknown[0]!r}")
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    try:
        return msgspec.convert(given, SamplingParams)
    except msgspec.ValidationError as error:
        raise ValueError(f"sampling_params: {error}") from error


def _is_nested(prompts: list[int] | list[list[int]]) -> bool:
    return any(isinstance(one, list) for one in prompts)
