"""Prometheus series: SGLang's names and labels, and what one request adds to each."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fixture import RunningServer

MODEL = {"model_name": "dummy"}
SCHEDULER = MODEL | {"engine_type": "unified", "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
# What dashboards made for SGLang read, with its labels.
GAUGES = (
    "num_running_reqs",
    "num_queue_reqs",
    "num_used_tokens",
    "max_total_num_tokens",
    "token_usage",
    "gen_throughput",
    "cache_hit_rate",
    "spec_accept_length",
    "spec_accept_rate",
    "page_size",
    "num_pages",
    "context_len",
    "kv_available_tokens",
    "kv_evictable_tokens",
    "num_retracted_requests_total",
    "num_retracted_input_tokens_total",
    "num_retracted_output_tokens_total",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "prompt_tokens_histogram",
    "uncached_prompt_tokens_histogram",
    "generation_tokens_histogram",
)
COUNTERS = (
    "num_requests_total",
    "num_aborted_requests_total",
    "prompt_tokens_total",
    "generation_tokens_total",
)

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(client: httpx.Client) -> Series:
    text = client.get("/metrics").raise_for_status().text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, frozenset(s.labels.items())): s.value for s in samples}


def key(name: str, labels: dict[str, str]) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"sglang:{name}", frozenset(labels.items())


def generate(client: httpx.Client, text: str, tokens: int, stream: bool = False) -> None:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"text": text, "sampling_params": sampling, "stream": stream}
    client.post("/generate", json=body).raise_for_status()


@pytest.fixture
def idle(server: RunningServer) -> Iterator[httpx.Client]:
    server.wait_state(num_running_reqs=0, num_waiting_reqs=0)
    with server.client() as client:
        yield client


def test_names_and_labels_are_sglangs(idle: httpx.Client) -> None:
    generate(idle, "x", 8)
    series = read(idle)
    names = [key(name, SCHEDULER) for name in [*GAUGES, "queue_time_seconds_count"]]
    names += [key(name, MODEL) for name in COUNTERS]
    names += [key(name + part, MODEL) for name in HISTOGRAMS for part in ("_count", "_sum")]
    names += [key("cached_tokens_total", MODEL | {"cache_source": "device"})]
    assert [name for name in names if name not in series] == []


def test_what_a_request_adds(idle: httpx.Client) -> None:
    """A prompt of which the cache has three pages."""
    prompt = "metrics " * 26  # 208 tokens
    generate(idle, prompt, 1)
    before = read(idle)
    generate(idle, prompt, 20, stream=True)
    after = read(idle)
    expected = {
        key("num_requests_total", MODEL): 1,
        key("request_outcomes_total", MODEL | {"outcome": "length"}): 1,
        key("num_aborted_requests_total", MODEL): 0,
        key("prompt_tokens_total", MODEL): 208,
        key("prompt_tokens_histogram_sum", MODEL): 208,
        key("uncached_prompt_tokens_histogram_sum", MODEL): 208 - 192,
        key("cached_tokens_total", MODEL | {"cache_source": "device"}): 192,
        key("generation_tokens_total", MODEL): 20,
        key("generation_tokens_histogram_sum", MODEL): 20,
        key("generation_tokens_histogram_count", MODEL): 1,
        key("time_to_first_token_seconds_count", MODEL): 1,
        key("e2e_request_latency_seconds_count", MODEL): 1,
        key("queue_time_seconds_count", SCHEDULER): 1,
    }
    assert {name: after[name] - before[name] for name in expected} == expected
    waited = key("queue_time_seconds_sum", SCHEDULER)
    lasted = key("e2e_request_latency_seconds_sum", MODEL)
    assert 0 <= after[waited] - before[waited] <= after[lasted] - before[lasted]


def test_gauges_of_the_cache(idle: httpx.Client) -> None:
    """While a request runs its pages are in use; afterwards none are."""

    def gauges() -> dict[str, float]:
        series = read(idle)
        return {name: series[key(name, SCHEDULER)] for name in GAUGES}

    def check(values: dict[str, float]) -> None:
        parts = ("num_used_tokens", "kv_available_tokens", "kv_evictable_tokens")
        assert sum(values[part] for part in parts) == values["max_total_num_tokens"] == 16384
        assert values["token_usage"] == values["num_used_tokens"] / 16384
        assert values["num_pages"] * values["page_size"] == 16384 and values["context_len"] == 2048

    thread = threading.Thread(target=generate, args=(idle, "y" * 200, 1800))
    thread.start()
    seen = gauges()
    while not seen["num_used_tokens"]:
        assert thread.is_alive(), "the request ended before its pages were seen"
        time.sleep(0.02)
        seen = gauges()
    check(seen)
    idle.post("/abort_request", json={"abort_all": True}).raise_for_status()
    thread.join()
    last = gauges()
    check(last)
    assert last["num_used_tokens"] == 0 and last["num_running_reqs"] == 0
    # of three drafts: a verification gives the accepted ones and one more
    assert last["spec_accept_rate"] == pytest.approx((last["spec_accept_length"] - 1) / 3)


def test_abort_is_counted(server: RunningServer, idle: httpx.Client) -> None:
    before = read(idle)
    with pytest.raises(httpx.ReadTimeout), server.client() as hasty:
        sampling = {"max_new_tokens": 1900, "ignore_eos": True}
        hasty.post("/generate", json={"text": "z", "sampling_params": sampling}, timeout=0.3)
    server.wait_state(num_running_reqs=0, num_waiting_reqs=0)
    after = read(idle)
    for name in ("num_requests_total", "num_aborted_requests_total"):
        assert after[key(name, MODEL)] - before[key(name, MODEL)] == 1
    latency = key("e2e_request_latency_seconds_count", MODEL)
    assert after[latency] == before[latency]
