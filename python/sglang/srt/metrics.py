"""Prometheus series of the server, in a registry of their own, with SGLang's names where it has one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
TOKEN_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True)
class StateSeries:
    """A series read from the scheduler's internal state when the metrics are asked for."""

    name: str
    path: tuple[str, ...]
    help: str
    kind: type[Metric] = GaugeMetricFamily


STATE_SERIES = (
    StateSeries("sglang:num_running_reqs", ("num_running_reqs",), "Requests that run."),
    StateSeries("sglang:num_queue_reqs", ("num_waiting_reqs",), "Requests that wait."),
    StateSeries(
        "sglang:num_retractions", ("num_retractions",), "Requests put back to wait.", CounterMetricFamily
    ),
    StateSeries("sglang:available_pages", ("available_pages",), "Free pages of the key-value cache."),
    StateSeries("sglang:evictable_pages", ("evictable_pages",), "Pages that hold only cached prefixes."),
    StateSeries("sglang:total_pages", ("total_pages",), "Pages of the key-value cache."),
    StateSeries("sglang:cache_hit_rate", ("cache_hit_rate",), "Share of prompt tokens found in the cache."),
    StateSeries("sglang:spec_accept_length", ("avg_spec_accept_length",), "Tokens per verification."),
    StateSeries(
        "sglang:nsa_metadata_enabled", ("nsa_metadata", "enabled"), "1: metadata is computed once per step."
    ),
    StateSeries(
        "sglang:nsa_metadata_draft_backends", ("nsa_metadata", "draft_backends"), "Draft attention backends."
    ),
    StateSeries(
        "sglang:nsa_metadata_replays",
        ("nsa_metadata", "replays"),
        "Replays whose metadata was computed once.",
        CounterMetricFamily,
    ),
    StateSeries(
        "sglang:nsa_metadata_fallbacks",
        ("nsa_metadata", "fallbacks"),
        "Times a slower metadata path had to be taken.",
        CounterMetricFamily,
    ),
)


class TokenRate:
    """Generated tokens per second over the last `window` seconds."""

    def __init__(self, window: float = 10.0) -> None:
        self._window = window
        self._events: deque[tuple[float, int]] = deque()
        self._start = time.perf_counter()

    def add(self, tokens: int) -> None:
        now = time.perf_counter()
        self._events.append((now, tokens))
        self._forget(now)

    def value(self) -> float:
        now = time.perf_counter()
        self._forget(now)
        span = min(self._window, max(now - self._start, 1e-3))
        return sum(tokens for _, tokens in self._events) / span

    def _forget(self, now: float) -> None:
        while self._events and self._events[0][0] < now - self._window:
            self._events.popleft()


class ServerMetrics:
    """Counts and latencies as the HTTP process sees them, and the scheduler's state beside them."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._state: dict[str, Any] = {}
        self.rate = TokenRate()
        self.registry = CollectorRegistry(auto_describe=False)
        self.requests = self._series(Counter, "num_requests", "Sequences by how they ended.", ("outcome",))
        self.prompt_tokens = self._series(Counter, "prompt_tokens", "Prompt tokens.").labels(model_name)
        self.cached_tokens = self._series(
            Counter, "cached_tokens", "Prompt tokens found in the cache."
        ).labels(model_name)
        self.generation_tokens = self._series(Counter, "generation_tokens", "Generated tokens.").labels(
            model_name
        )
        self.time_to_first_token = self._latency(
            "time_to_first_token_seconds", "Time to the first token of a stream.", LATENCY_BUCKETS
        )
        self.inter_token_latency = self._latency(
            "inter_token_latency_seconds", "Time between tokens of a stream.", TOKEN_BUCKETS
        )
        self.e2e_request_latency = self._latency(
            "e2e_request_latency_seconds", "Time from request to last token.", LATENCY_BUCKETS
        )
        self.registry.register(self)

    def _series(self, kind: type[Counter], name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
        return kind(f"sglang:{name}", help, ("model_name", *labels), registry=self.registry)

    def _latency(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"sglang:{name}", help, ("model_name",), registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model_name)

    def count_request(self, outcome: str) -> None:
        """One sequence ended: stop, length, abort, disconnect or error."""
        self.requests.labels(self._model_name, outcome).inc()

    def collect(self) -> Iterator[Metric]:
        """Called by the registry: the series that are not counted here but read."""
        values = [
            ("sglang:gen_throughput", "Generated tokens per second.", GaugeMetricFamily, self.rate.value())
        ]
        values += [(s.name, s.help, s.kind, _lookup(self._state, s.path)) for s in STATE_SERIES]
        for name, help, kind, value in values:
            if value is not None:
                family = kind(name, help, labels=("model_name",))
                family.add_metric((self._model_name,), float(value))
                yield family

    def render(self, internal_state: dict[str, Any]) -> bytes:
        """The text that Prometheus reads."""
        self._state = internal_state
        return generate_latest(self.registry)


def _lookup(state: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        state = state.get(key) if isinstance(state, dict) else None
    return state
