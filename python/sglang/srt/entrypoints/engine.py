"""Offline use: the whole engine in this process, without HTTP."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.arguments import flag, unknown_names
from sglang.srt.entrypoints.choice import Choice
from sglang.srt.entrypoints.generate_batch import Item, items
from sglang.srt.entrypoints.generate_protocol import GenerateReqInput
from sglang.srt.entrypoints.request_body import parse_members
from sglang.srt.errors import RequestError
from sglang.srt.managers.detokenizer import OutputText
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchOutput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    ReqOutput,
    new_rid,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_link import LocalLink
from sglang.srt.managers.worker_factory import create_worker
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Answer = dict[str, Any]  # {"text", "output_ids", "meta_info"}


class Engine:
    """Generates text in this process. Takes SGLang's keywords: the fields of `ServerArgs`, or `server_args`.

    with Engine(model_path="models/tiny") as engine:
        print(engine.generate("The capital of", {"max_new_tokens": 16, "temperature": 0})["text"])

    Calls from several threads or tasks run together, in one batch. Raises TypeError that names a keyword
    there is not, and ValueError that names one whose value cannot be.
    """

    def __init__(self, **server_args: Any) -> None:
        self.server_args = _server_args(server_args)
        self.tokenizer = load_tokenizer(self.server_args.tokenizer_path)
        self.link = LocalLink()
        worker = create_worker(self.server_args)
        self.scheduler = Scheduler(self.server_args, worker, self.link, self.tokenizer)
        self._generations: dict[str, Generation] = {}  # all that are not finished, by the sequence's rid
        self._answers: dict[str, FlushCacheReqOutput] = {}
        # An abort finds a generation only when its request is in the inbox. Reentrant, since a stream that
        # nobody follows is closed wherever the collector runs.
        self._sending = threading.RLock()
        self._stepping = threading.Lock()  # whoever holds it runs the scheduler, for everybody
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")  # steps for the event loops

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        stream: bool = False,
        **fields: Any,
    ) -> Answer | list[Answer] | Iterator[Answer]:
        """Completes one prompt or a list of them, given as text or as token ids.

        `fields` are the others of POST /generate (docs/http_api.md): return_logprob, logprob_start_len,
        top_logprobs_num, return_token_sources, rid, and those of SGLang's that ask for nothing.
        Returns `{"text", "output_ids", "meta_info"}`, or a list of these for a list of prompts or for n > 1.
        With `stream` an iterator over such dicts, each with all text so far, and where there are several with
        the "index". Raises ValueError that names what is wrong with a request; then none of the list is
        generated.
        """
        batch = self._batch(prompt, sampling_params, input_ids, stream, fields)
        if stream:
            return self._stream(batch)
        with self._running(batch):
            while not self._advance(batch)[1]:
                pass
        return batch.answer()

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        stream: bool = False,
        **fields: Any,
    ) -> Answer | list[Answer] | AsyncIterator[Answer]:
        """As `generate`, without blocking the event loop; cancelling the task aborts its requests."""
        batch = self._batch(prompt, sampling_params, input_ids, stream, fields)
        if stream:
            return self._async_stream(batch)
        with self._running(batch):
            while not (await self._advance_in_thread(batch))[1]:
                pass
        return batch.answer()

    def flush_cache(self) -> FlushCacheReqOutput:
        """Empties the prefix cache. Not successful, and nothing is changed, while something is generated."""
        request_id = new_rid()
        with self._stepping:
            self.link.inbox.append(FlushCacheReqInput(request_id))
            self._step()
            return self._answers.pop(request_id)

    def get_server_info(self) -> dict[str, Any]:
        """The arguments, and the scheduler's state under `internal_states`."""
        with self._stepping:
            return self.server_args.to_dict() | {"internal_states": [self.scheduler.internal_state()]}

    def shutdown(self) -> None:
        """Gives up what is still generated."""
        self.abort_request(abort_all=True)
        self._thread.shutdown()

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """Ends one request with all its prompts and choices, or all requests, as they stand; who waits for
        one gets what was generated."""
        with self._sending:
            running = list(self._generations.values())
            sequences = [g.sequence for g in running if abort_all or rid in g.choice.names]
            if sequences:
                self.link.inbox.append(AbortReq(sequences))  # who steps now sees it, too
        if sequences:
            with self._stepping:
                self._step()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _batch(self, prompt: Any, sampling_params: Any, input_ids: Any, stream: bool, fields: Any) -> Batch:
        if (prompt is None) == (input_ids is None):
            raise ValueError("give either prompt or input_ids")
        given = {"text": prompt, "input_ids": input_ids, "sampling_params": sampling_params, "stream": stream}
        try:
            body = parse_members(GenerateReqInput, given | fields)
            choices = [choice for item in items(body) for choice in self._choices(item)]
        except RequestError as error:
            raise ValueError(error.message) from None
        for choice in choices:
            self.scheduler.validate(choice.request)
        return Batch([Generation.start(choice, self.tokenizer) for choice in choices], body)

    def _choices(self, item: Item) -> list[Choice]:
        ids = item.prompt if isinstance(item.prompt, list) else self.tokenizer.encode(item.prompt)
        return [item.choice(number, ids, item.params) for number in range(item.n)]

    @contextmanager
    def _running(self, batch: Batch) -> Iterator[None]:
        """Hands the batch to the scheduler; what is not finished at the end is aborted in the next step."""
        with self._sending:
            self._generations |= {g.sequence: g for g in batch.generations}
            self.link.inbox.extend(g.choice.request for g in batch.generations)
        try:
            yield
        finally:
            with self._sending:
                if left := [g.sequence for g in batch.generations if not g.finished]:
                    self.link.inbox.append(AbortReq(left))
                for generation in batch.generations:
                    self._generations.pop(generation.sequence, None)

    def _stream(self, batch: Batch) -> Iterator[Answer]:
        with self._running(batch):
            finished = False
            while not finished:
                news, finished = self._advance(batch)
                yield from news

    async def _async_stream(self, batch: Batch) -> AsyncIterator[Answer]:
        with self._running(batch):
            finished = False
            while not finished:
                news, finished = await self._advance_in_thread(batch)
                for one in news:
                    yield one

    async def _advance_in_thread(self, batch: Batch) -> tuple[list[Answer], bool]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._advance, batch)

    def _advance(self, batch: Batch) -> tuple[list[Answer], bool]:
        """What is new of a batch, after a step of all batches where nothing was; and whether that is all."""
        with self._stepping:
            if not (batch.has_news or batch.finished):
                self._step()
            return batch.news(), batch.finished

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
    def start(cls, choice: Choice, tokenizer: PreTrainedTokenizerBase) -> Generation:
        request = choice.request
        return cls(choice, OutputText(tokenizer, request.sampling_params, request.return_token_sources))

    @property
    def sequence(self) -> str:
        """The scheduler's name for it."""
        return self.choice.request.rid

    @property
    def finished(self) -> bool:
        return self.choice.finish_reason is not None

    def add(self, output: ReqOutput) -> None:
        text = self.detokenizer.feed(output.output_ids, output.finish_reason)
        self.choice.add(output, text, self.detokenizer.take_offsets())
        self.has_news = True


class Batch:
    """The sequences of one call."""

    def __init__(self, generations: list[Generation], body: GenerateReqInput) -> None:
        self.generations = generations
        self._single = len(generations) == 1 and not body.is_batch
        self._stream = bool(body.stream)

    @property
    def has_news(self) -> bool:
        return any(g.has_news for g in self.generations)

    @property
    def finished(self) -> bool:
        return all(g.finished for g in self.generations)

    def news(self) -> list[Answer]:
        """Those with news, as they stand; nothing where nobody follows them."""
        news = []
        for index, generation in enumerate(self.generations):
            if generation.has_news and self._stream:
                news.append(generation.choice.native() | ({} if self._single else {"index": index}))
            generation.has_news = False
        return news

    def answer(self) -> Answer | list[Answer]:
        answers = [generation.choice.native() for generation in self.generations]
        return answers[0] if self._single else answers


def _server_args(given: dict[str, Any]) -> ServerArgs:
    """Raises TypeError and ValueError in the words of a caller: keywords, not flags."""
    if isinstance(given.get("server_args"), ServerArgs) and len(given) == 1:
        return given["server_args"]
    for wrong in unknown_names(ServerArgs, list(given)):
        raise TypeError(f"Engine has no argument {wrong}")
    if "model_path" not in given:
        raise TypeError("Engine needs model_path")
    try:
        return ServerArgs(**given)
    except ValueError as error:
        names = {flag(f): f for f in ServerArgs.__dataclass_fields__}
        message = re.sub(r"--[a-z0-9-]+", lambda found: names.get(found[0], found[0]), str(error))
        raise ValueError(message) from None
