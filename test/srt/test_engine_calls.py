"""The engine as SGLang's users call it: their keywords, several calls at once, tasks that are cancelled."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from sglang import Engine
from sglang.srt.server_args import ServerArgs

PARAMS = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
PROMPTS = ["one", "two, three", "four five six", "seven"]


@pytest.fixture(scope="module")
def engine(dummy_model: Path) -> Iterator[Engine]:
    options = {"tp_size": 1, "trust_remote_code": True, "mem_fraction_static": 0.7, "log_level": "error"}
    options |= {"speculative_algorithm": "EAGLE", "speculative_num_steps": 3, "max_total_tokens": 4096}
    with Engine(model_path=str(dummy_model), device="cpu", **options) as engine:
        yield engine


@pytest.mark.parametrize(
    "keywords,error,said",
    [
        ({"model_pth": "m"}, TypeError, "no argument 'model_pth': did you mean model_path"),
        ({"model_path": "m", "tp": 2}, TypeError, "no argument 'tp'"),
        ({}, TypeError, "model_path"),
        ({"model_path": "m", "tp_size": 2}, ValueError, "^tp_size 2 is not supported: .*plugin"),
        ({"model_path": "m", "port": "http"}, ValueError, "^port must be an int, got 'http'"),
        ({"model_path": "m", "speculative_num_steps": 2}, ValueError, "speculative_algorithm"),
        ({"model_path": "m", "page_size": 3}, ValueError, "^page_size must be a power of two"),
    ],
)
def test_wrong_keywords_are_named_as_they_were_written(
    keywords: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as raised:
        Engine(device="cpu", **keywords)
    assert "--" not in str(raised.value)


def test_server_args_as_one_argument(dummy_model: Path) -> None:
    args = ServerArgs(model_path=str(dummy_model), device="cpu", max_total_tokens=1024)
    with Engine(server_args=args) as engine:
        assert engine.generate("x", {"max_new_tokens": 1})["meta_info"]["completion_tokens"] == 1


def test_async_calls_run_together_and_give_the_same(engine: Engine) -> None:
    alone = [engine.generate(prompt, PARAMS)["output_ids"] for prompt in PROMPTS]

    async def run() -> tuple[list[Any], int]:
        tasks = [asyncio.ensure_future(engine.async_generate(prompt, PARAMS)) for prompt in PROMPTS]
        most = 0
        while not all(task.done() for task in tasks):  # the loop goes on meanwhile
            most = max(most, engine.scheduler.internal_state()["num_running_reqs"])
            await asyncio.sleep(0.001)
        return [task.result() for task in tasks], most

    results, most = asyncio.run(run())
    assert [result["output_ids"] for result in results] == alone
    assert most == len(PROMPTS)


def test_async_batch_and_stream(engine: Engine) -> None:
    whole = engine.generate(PROMPTS, PARAMS | {"n": 2})
    assert len(whole) == 2 * len(PROMPTS)

    async def run() -> tuple[Any, list[Any]]:
        batch = await engine.async_generate(PROMPTS, PARAMS | {"n": 2})
        stream = await engine.async_generate(PROMPTS[0], PARAMS, stream=True)
        return batch, [chunk async for chunk in stream]

    batch, chunks = asyncio.run(run())
    assert [one["text"] for one in batch] == [one["text"] for one in whole]
    assert len(chunks) > 2 and chunks[-1]["text"] == whole[0]["text"]
    assert all(chunks[-1]["text"].startswith(chunk["text"]) for chunk in chunks)


def test_threads_may_call_at_once(engine: Engine) -> None:
    alone = [engine.generate(prompt, PARAMS)["text"] for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: engine.generate(prompt, PARAMS)["text"], PROMPTS * 4))
    assert together == alone * 4


def test_cancelled_task_frees_its_request(engine: Engine) -> None:
    async def run() -> None:
        task = asyncio.ensure_future(engine.async_generate("x", PARAMS | {"max_new_tokens": 1500}))
        while not engine.scheduler.requests:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert engine.flush_cache().success  # the abort is handled in the same step
    assert engine.scheduler.check_memory() is None


def test_abort_by_the_callers_rid(engine: Engine) -> None:
    long = PARAMS | {"max_new_tokens": 1500}
    stream = engine.generate("x", long, rid="mine", stream=True)
    assert next(stream)["meta_info"]["id"] == "mine"
    engine.abort_request("somebody else's")
    engine.abort_request("mine")
    *_, last = stream
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < last["meta_info"]["completion_tokens"] < 1500


class SlowInbox(deque[Any]):
    """Lets somebody else come in between before it takes requests."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self.meanwhile = meanwhile

    def extend(self, requests: Iterable[Any]) -> None:
        self.meanwhile()
        super().extend(requests)


def test_abort_while_a_request_is_handed_over(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an abort of another thread, between the table of generations and the inbox, was before its
    request in the inbox, and so lost."""
    with ThreadPoolExecutor(1) as other:
        aborts: list[Future[None]] = []

        def abort() -> None:
            aborts.append(other.submit(engine.abort_request, "mine"))
            wait(aborts, 0.2)  # it comes now, or has to wait

        monkeypatch.setattr(engine.link, "inbox", SlowInbox(abort))
        answer = engine.generate("x", PARAMS | {"max_new_tokens": 100}, rid="mine")
        aborts[0].result(10)
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert engine.scheduler.is_idle and engine.scheduler.check_memory() is None


TOKENS = 120
LONG = PARAMS | {"max_new_tokens": TOKENS, "n": 2}


@pytest.fixture(scope="module")
def whole(engine: Engine) -> list[Any]:
    return engine.generate(PROMPTS[:2], LONG)


@pytest.mark.parametrize("rid", ["mine", None], ids=["by rid", "abort_all"])
def test_abort_ends_all_prompts_and_choices_with_their_text_so_far(
    engine: Engine, whole: list[Any], rid: str | None
) -> None:
    """Bug: of a request with several prompts or choices, its rid ended the first choice at most."""
    with ThreadPoolExecutor(2) as pool:
        mine = pool.submit(engine.generate, PROMPTS[:2], LONG, rid="mine")
        other = pool.submit(engine.generate, PROMPTS[2], PARAMS | {"max_new_tokens": TOKENS}, rid="other")
        while sum(len(req.output_ids) > 3 for req in list(engine.scheduler.requests.values())) < 5:
            assert not (mine.done() or other.done())
            time.sleep(0.001)  # the engine's threads need the interpreter
        engine.abort_request(*(() if rid is None else (rid,)), abort_all=rid is None)
        answers, last = mine.result(), other.result()
    assert last["meta_info"]["finish_reason"]["type"] == ("abort" if rid is None else "length")
    assert engine.scheduler.is_idle and engine.scheduler.check_memory() is None
    for answer, complete in zip(answers, whole, strict=True):
        count = answer["meta_info"]["completion_tokens"]
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert 3 < count == len(answer["output_ids"]) < TOKENS
        assert answer["output_ids"] == complete["output_ids"][:count]
        assert answer["text"] == engine.tokenizer.decode(answer["output_ids"], skip_special_tokens=True)


def test_fields_of_sglang_that_ask_for_nothing(engine: Engine) -> None:
    plain = engine.generate("one", PARAMS)["text"]
    fields = {"image_data": None, "lora_path": [None], "return_hidden_states": False, "return_logprob": None}
    assert engine.generate("one", PARAMS | {"stop": ("\x00",)}, **fields)["text"] == plain
