"""Prometheus series of the server, in a registry of their own. Names and labels are SGLang's."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

T = TypeVar("T", Counter, Histogram)

LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
COUNT_BUCKETS = tuple(2**i for i in range(18))  # tokens
ABORTED = ("abort", "disconnect")

# The scheduler's series carry these beside the model's name: there is one, on one GPU.
SCHEDULER_LABELS = {"engine_type": "unified", "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
TOKEN_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True)
class StateSeries:
    """A series (sglang:name) read from the scheduler's internal state when the metrics are asked for."""

    name: str
    path: tuple[str, ...]
    help: str
    kind: type[Metric] = GaugeMetricFamily


STATE_SERIES = (
    StateSeries("num_running_reqs", ("num_running_reqs",), "Requests that run."),
    StateSeries("num_queue_reqs", ("num_waiting_reqs",), "Requests that wait."),
    StateSeries("num_used_tokens", ("num_used_tokens",), "Tokens of the cache that requests hold."),
    StateSeries("max_total_num_tokens", ("max_total_num_tokens",), "Tokens that the cache holds at most."),
    StateSeries("token_usage", ("token_usage",), "Share of the cache that requests hold."),
    StateSeries("kv_available_tokens", ("kv_available_tokens",), "Free tokens of the cache."),
    StateSeries("kv_evictable_tokens", ("kv_evictable_tokens",), "Tokens that are only cached prefixes."),
    StateSeries("page_size", ("page_size",), "Tokens in a page of the cache."),
    StateSeries("num_pages", ("total_pages",), "Pages of the cache."),
    StateSeries("context_len", ("context_len",), "Longest sequence."),
    StateSeries("cache_hit_rate", ("cache_hit_rate",), "Share of prompt tokens found in the cache."),
    StateSeries("spec_accept_length", ("avg_spec_accept_length",), "Tokens per verification."),
    StateSeries("spec_accept_rate", ("avg_spec_accept_rate",), "Accepted drafts per proposed draft."),
    StateSeries(
        "num_retracted_requests", ("num_retractions",), "Requests put back to wait.", CounterMetricFamily
    ),
    StateSeries(
        "num_retracted_input_tokens",
        ("num_retracted_input_tokens",),
        "Prompt tokens of requests put back to wait.",
        CounterMetricFamily,
    ),
    StateSeries(
        "num_retracted_output_tokens",
        ("num_retracted_output_tokens",),
        "Generated tokens of requests put back to wait.",
        CounterMetricFamily,
    ),
    StateSeries("nsa_metadata_enabled", ("nsa_metadata", "enabled"), "1: metadata is computed once a step."),
    StateSeries(
        "nsa_metadata_draft_backends", ("nsa_metadata", "draft_backends"), "Draft attention backends."
    ),
    StateSeries(
        "nsa_metadata_replays",
        ("nsa_metadata", "replays"),
        "Replays whose metadata was computed once.",
        CounterMetricFamily,
    ),
    StateSeries(
        "nsa_metadata_fallbacks",
        ("nsa_metadata", "fallbacks"),
        "Times a slower metadata path had to be taken.",
        CounterMetricFamily,
    ),
)


class TokenRate:
    """Generated tokens per second, while there was something to generate, in the last `window` seconds."""

    def __init__(self, window: float = 10.0) -> None:
        self._window = window
        self._events: deque[tuple[float, int, float]] = deque()  # when, tokens, seconds that they took
        self._last = 0.0

    def begin(self) -> None:
        """A first request runs: the time before it was idle."""
        self._last = time.perf_counter()

    def add(self, tokens: int) -> None:
        now = time.perf_counter()
        self._events.append((now, tokens, now - self._last))
        self._last = now
        self._forget(now)

    def value(self) -> float:
        self._forget(time.perf_counter())
        seconds = sum(seconds for _, _, seconds in self._events)
        return sum(tokens for _, tokens, _ in self._events) / max(seconds, 1e-3)

    def _forget(self, now: float) -> None:
        while self._events and self._events[0][0] < now - self._window:
            self._events.popleft()


class ServerMetrics:
    """Counts and latencies as the HTTP process sees them, and the scheduler's state beside them."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._state: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}
        self.rate = TokenRate()
        self.registry = CollectorRegistry(auto_describe=False)
        self.requests = self._counter("num_requests", "Sequences that ended.")
        self.aborted_requests = self._counter("num_aborted_requests", "Sequences that were aborted.")
        self.outcomes = {
            outcome: self._counter("request_outcomes", "Sequences by how they ended.", outcome=outcome)
            for outcome in ("stop", "length", "abort", "disconnect", "error")
        }
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.cached_tokens = self._counter(
            "cached_tokens", "Prompt tokens found in the cache.", cache_source="device"
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Time to the first token of a stream.", LATENCY_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Time between tokens of a stream.", TOKEN_BUCKETS
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "Time from request to last token.", LATENCY_BUCKETS
        )
        self.queue_time = self._histogram(
            "queue_time_seconds", "Time that a request waited to run.", LATENCY_BUCKETS, **SCHEDULER_LABELS
        )
        self.prompt_lengths = self._histogram("prompt_tokens_histogram", "Tokens of a prompt.", COUNT_BUCKETS)
        self.uncached_prompt_lengths = self._histogram(
            "uncached_prompt_tokens_histogram", "Tokens of a prompt that were computed.", COUNT_BUCKETS
        )
        self.generation_lengths = self._histogram(
            "generation_tokens_histogram", "Tokens generated for a request.", COUNT_BUCKETS
        )
        self.registry.register(self)

    def _counter(self, name: str, help: str, **labels: str) -> Counter:
        return self._labelled(Counter, name, help, labels)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...], **labels: str) -> Histogram:
        return self._labelled(Histogram, name, help, labels, buckets=buckets)

    def _labelled(self, kind: type[T], name: str, help: str, labels: dict[str, str], **options: Any) -> T:
        """The series for these values of its labels; the same name with others is the same metric."""
        name = f"sglang:{name}"
        if name not in self._metrics:
            names = ("model_name", *labels)
            self._metrics[name] = kind(name, help, names, registry=self.registry, **options)
        return self._metrics[name].labels(self._model_name, *labels.values())

    def first_output(self, queue_time: float, cached_tokens: int) -> None:
        """The first tokens of a sequence have come, after `queue_time` seconds of waiting."""
        self.queue_time.observe(queue_time)
        self.cached_tokens.inc(cached_tokens)

    def finished(self, latency: float, prompt_tokens: int, cached_tokens: int, generated_tokens: int) -> None:
        """A sequence ended by itself, `latency` seconds after it came."""
        self.e2e_request_latency.observe(latency)
        self.prompt_lengths.observe(prompt_tokens)
        self.uncached_prompt_lengths.observe(prompt_tokens - cached_tokens)
        self.generation_lengths.observe(generated_tokens)

    def count_request(self, outcome: str) -> None:
        """One sequence ended: stop, length, abort, disconnect or error."""
        self.requests.inc()
        self.outcomes[outcome].inc()
        if outcome in ABORTED:
            self.aborted_requests.inc()

    def collect(self) -> Iterator[Metric]:
        """Called by the registry: the series that are not counted here but read."""
        values = [("gen_throughput", "Generated tokens per second.", GaugeMetricFamily, self.rate.value())]
        values += [(s.name, s.help, s.kind, _lookup(self._state, s.path)) for s in STATE_SERIES]
        labels = {"model_name": self._model_name} | SCHEDULER_LABELS
        for name, help, kind, value in values:
            if value is not None:
                family = kind(f"sglang:{name}", help, labels=tuple(labels))
                family.add_metric(tuple(labels.values()), float(value))
                yield family

    def render(self, internal_state: dict[str, Any]) -> bytes:
        """The text that Prometheus reads."""
        self._state = internal_state
        return generate_latest(self.registry)


def _lookup(state: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        state = state.get(key) if isinstance(state, dict) else None
    return state
