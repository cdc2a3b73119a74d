"""The load generator against a real server: what it reports is what was asked for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
from aiohttp import web
from server_fixture import RunningServer, free_port
from sglang.bench_serving import main
from sglang.benchmark_serving.arguments import parse_args
from sglang.benchmark_serving.datasets import load_samples, load_tokenizer
from sglang.benchmark_serving.endpoints import BACKENDS, Result
from sglang.benchmark_serving.metrics import statistics

LENGTHS = ("--random-input-len", "20", "--random-output-len", "8", "--random-range-ratio", "1")
FIGURES = ("ttft", "tpot", "itl", "e2e_latency")
STATISTICS = ("mean", "median", "std", "p90", "p95", "p99", "max")


def run(port: int, out: Path, *flags: str) -> dict[str, Any]:
    argv = ["--port", str(port), "--disable-tqdm", "--num-prompts", "6", "--output-file", str(out), *flags]
    assert main(argv) == 0
    return json.loads(out.read_text().splitlines()[-1])


@pytest.fixture
def port(server: RunningServer) -> int:
    return urlparse(server.url).port


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_reports_what_was_generated(backend: str, port: int, tmp_path: Path) -> None:
    flags = ("--backend", backend, *LENGTHS, "--max-concurrency", "3", "--output-details", "--tag", "mine")
    result = run(port, tmp_path / "out.jsonl", *flags)
    assert (result["tag"], result["backend"]) == ("mine", backend)
    assert (result["completed"], result["failed"], result["errors"]) == (6, 0, [""] * 6)
    ignores_eos = "openai" not in backend  # only these send what is not OpenAI's
    if ignores_eos:
        assert result["output_lens"] == [8] * 6
    if BACKENDS[backend].endpoint.takes_ids and BACKENDS[backend].sglang:  # whose tokenizer is known
        assert result["total_input_tokens"] == 6 * 20
    assert result["total_output_tokens"] == sum(result["output_lens"])
    assert result["output_throughput"] == pytest.approx(result["total_output_tokens"] / result["duration"])
    assert 1 <= result["max_concurrent_requests"] <= 3
    sglang = BACKENDS[backend].sglang
    assert (result["accept_length"] is not None) == (result["server_info"] is not None) == sglang
    assert len(result["generated_texts"]) == 6
    for name in FIGURES if ignores_eos else ("ttft", "e2e_latency"):
        values = [result[f"{key}_{name}_ms"] for key in STATISTICS]
        assert all(value >= 0 for value in values), name
        assert result[f"median_{name}_ms"] <= result[f"p95_{name}_ms"] <= result[f"max_{name}_ms"]
    if ignores_eos:  # per token, though a verification's tokens come together
        counts = [len(gaps) for gaps in result["itls"]]
        # OpenAI's form sends no event for a token that completes no character
        assert counts == [7] * 6 if BACKENDS[backend].endpoint.path == "/generate" else max(counts) <= 7
        for gaps, first, whole in zip(result["itls"], result["ttfts"], result["latencies"]):
            assert sum(gaps) == pytest.approx(whole - first)


def test_whole_answers_with_logprobs(port: int, tmp_path: Path) -> None:
    for backend in ("sglang", "sglang-oai", "sglang-oai-chat"):
        flags = ("--backend", backend, *LENGTHS, "--disable-stream", "--return-logprob", "--flush-cache")
        result = run(port, tmp_path / "out.jsonl", *flags)
        assert result["total_output_tokens"] == 6 * 8 and result["mean_e2e_latency_ms"] > 0
        assert result["mean_ttft_ms"] is result["mean_tpot_ms"] is result["mean_itl_ms"] is None


def test_errors_are_counted(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--random-output-len", "5000", "--random-range-ratio", "1", "--warmup-requests", "0")
    assert main(["--port", str(port), "--disable-tqdm", "--num-prompts", "3", *flags]) == 1
    out = capsys.readouterr().out
    assert "HTTP 400" in out and "max_new_tokens" in out


# Datasets


def samples(dummy_model: Path | None, *flags: str, takes_ids: bool = True) -> list[Any]:
    args = parse_args([*flags], "")
    return load_samples(args, load_tokenizer(dummy_model and str(dummy_model)), takes_ids)


def test_lengths_are_within_the_ratio(dummy_model: Path) -> None:
    flags = ("--num-prompts", "200", "--random-input-len", "40", "--random-output-len", "10")
    for ratio, low in (("0", 1), ("0.5", 20), ("1", 40)):
        for name in ("random", "random-ids"):
            made = samples(dummy_model, *flags, "--dataset-name", name, "--random-range-ratio", ratio)
            lengths = [len(s.prompt) for s in made]
            assert min(lengths) >= low and max(lengths) == 40 and max(s.max_tokens for s in made) == 10
    assert isinstance(samples(dummy_model, *flags, takes_ids=False)[0].prompt, str)


def conversation(*texts: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text} for text in texts]}


def test_sharegpt(dummy_model: Path, tmp_path: Path) -> None:
    """The dummy model's tokens are bytes."""
    path = tmp_path / "sharegpt.json"
    kept = [conversation("hello", "four"), conversation("goodbye", "sixsix", "more")]
    path.write_text(json.dumps([*kept, conversation("alone"), conversation("x", "short prompt"), {"id": 1},
                                conversation("too long", "y" * 50)]))  # fmt: skip
    flags = ("--dataset-name", "sharegpt", "--dataset-path", str(path), "--sharegpt-context-len", "20")
    made = samples(dummy_model, *flags)
    assert sorted((s.prompt, s.max_tokens) for s in made) == [("goodbye", 6), ("hello", 4)]
    assert {s.max_tokens for s in samples(dummy_model, *flags, "--sharegpt-output-len", "9")} == {9}
    ids = samples(dummy_model, *flags, "--tokenize-prompt", "--num-prompts", "1")[0].prompt
    assert bytes(ids).decode() in ("hello", "goodbye")
    templated = samples(dummy_model, *flags, "--apply-chat-template")
    assert all(s.prompt != before.prompt and before.prompt in s.prompt for s, before in zip(templated, made))
    with pytest.raises(ValueError, match="--tokenizer"):
        samples(None, *flags)


def test_custom(tmp_path: Path) -> None:
    path = tmp_path / "custom.jsonl"
    lines = [{"prompt": "one", "max_tokens": 2}, {"prompt": [1, 2, 3]}, conversation("four", "reply")]
    path.write_text("\n".join(map(json.dumps, lines)))
    flags = ("--dataset-name", "custom", "--dataset-path", str(path), "--random-output-len", "5")
    made = samples(None, *flags, "--num-prompts", "4")
    assert [(s.prompt, s.max_tokens) for s in made] == [("one", 2), ([1, 2, 3], 5), ("four", 5), ("one", 2)]
    for text, named in (('{"a": 1}', "line 1"), ("[1]", "entry 1"), ("{", "JSONL")):
        path.write_text(text)
        with pytest.raises(ValueError, match=named):
            samples(None, *flags)


# Figures


@pytest.mark.parametrize(
    ("arrivals", "tokens", "gaps"),
    [
        ([(1.0, 1), (1.5, 2), (3.5, 6)], 6, [0.5, 0.5, 0.5, 0.5, 0.5]),
        ([(1.0, 3), (2.0, 4)], 4, [1.0]),
        ([(1.0, 1)], 1, []),
        ([(1.0, 1), (2.0, 2)], 7, []),  # events without counts that held several tokens each
        ([], 5, []),
    ],
)
def test_inter_token_latency_is_per_token(
    arrivals: list[tuple[float, int]], tokens: int, gaps: list[float]
) -> None:
    """Bug: the gap between two events was counted once, however many tokens the second one brought."""
    result = Result(start=0.0, arrivals=arrivals, completion_tokens=tokens)
    assert result.inter_token_latencies == gaps


def test_statistics() -> None:
    seconds = np.random.default_rng(0).exponential(size=100).tolist()
    found = statistics("x", seconds)
    assert found["std_x_ms"] == pytest.approx(1e3 * np.std(seconds))
    assert found["p95_x_ms"] == pytest.approx(1e3 * np.percentile(seconds, 95))
    assert statistics("x", []) == {f"{key}_x_ms": None for key in STATISTICS}


# A server that only OpenAI's form is known of, with two tokens in every event


class Recorder:
    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.refusals = 2  # of /health, as while a server loads

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.path, dict(request.headers)))
        if request.path == "/health" and self.refusals:
            self.refusals -= 1
            return web.Response(status=503)
        if request.path != "/v1/completions":
            return web.json_response({"data": [{"id": "m"}], "tokenizer_path": "", "internal_states": [{}]})
        chunks = [{"choices": [{"text": "ab"}]}] * 3
        usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 6}}
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, usage]) + "data: [DONE]\n\n"
        return web.Response(text=body, content_type="text/event-stream")


@pytest.fixture
def recorder() -> Iterator[tuple[Recorder, int]]:
    recorder, port, loop = Recorder(), free_port(), asyncio.new_event_loop()

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", recorder.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()

    loop.run_until_complete(serve())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield recorder, port
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_headers_readiness_and_flush_come_in_order(recorder: tuple[Recorder, int], tmp_path: Path) -> None:
    seen, port = recorder
    flags = (
        "--backend",
        "sglang-oai",
        "--header",
        "X-Test=a=b",
        "X-Other=2",
        "--api-key",
        "k",
        "--flush-cache",
    )
    run(port, tmp_path / "out.jsonl", *flags, "--request-rate", "100", "--num-prompts", "2")
    paths = [path for path, _ in seen.requests]
    assert paths[:3] == ["/health"] * 3
    work = [path for path in paths if path in ("/v1/completions", "/flush_cache")]
    assert work == ["/v1/completions", "/flush_cache", "/v1/completions", "/v1/completions"]
    for _, headers in seen.requests:
        assert (headers["X-Test"], headers["X-Other"], headers["Authorization"]) == ("a=b", "2", "Bearer k")


def test_latency_per_token_is_left_out_where_it_is_not_known(
    recorder: tuple[Recorder, int], tmp_path: Path
) -> None:
    result = run(recorder[1], tmp_path / "out.jsonl", "--backend", "openai")
    assert (result["total_output_tokens"], result["mean_itl_ms"]) == (36, None)
    assert result["mean_tpot_ms"] is not None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--request-rate", "0"), "--request-rate"),
        (("--num-prompts", "0"), "--num-prompts"),
        (("--random-range-ratio", "2"), "--random-range-ratio"),
        (("--dataset-name", "custom", "--dataset-path", "/nowhere.jsonl"), "/nowhere.jsonl"),
        (("--dataset-name", "sharegpt"), "--dataset-path"),
        (("--backend", "vllm", "--flush-cache"), "--flush-cache"),
        (("--header", "nothing"), "--header"),
        (("--extra-request-body", "[1]"), "--extra-request-body"),
        (("--extra-request-body", "{"), "--extra-request-body"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_flags_are_named(flags: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(list(flags))
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("timeout", ["0", "0.6"])
def test_no_server_is_an_error(timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--num-prompts", "1", "--disable-tqdm", "--ready-check-timeout-sec", timeout)
    assert main(["--port", "1", *flags]) == 1
    error = capsys.readouterr().err
    assert "127.0.0.1:1" in error and ("--ready-check-timeout-sec" in error) == (timeout != "0")
