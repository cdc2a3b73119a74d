"""What the plugin did in this process, as Prometheus series where SGLang serves metrics."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

FLUSH_EVERY = 64  # replays between two updates of the series: an update costs more than a replay may


@dataclass
class Counters:
    generated: int = 0  # replays whose metadata our kernel wrote
    own_refreshes: int = 0  # replays whose metadata SGLang's own path wrote into the shared set
    verified: int = 0
    _series: Any = None
    _flushed: dict[str, int] = field(default_factory=dict)
    _ticks: int = 0

    def started(self, layout: str, backends: int, saved_bytes: int) -> None:
        self._series = self._series or Series.create()
        if self._series is not None:
            self._series.started(layout, backends, saved_bytes)

    def left_alone(self, reason: str) -> None:
        self._series = self._series or Series.create()
        if self._series is not None:
            self._series.left_alone.inc()

    def tick(self) -> None:
        self._ticks += 1
        if self._series is not None and self._ticks % FLUSH_EVERY == 0:
            self.flush()

    def flush(self) -> None:
        for name in ("generated", "own_refreshes", "verified"):
            value = getattr(self, name)
            self._series.replays[name].inc(value - self._flushed.get(name, 0))
            self._flushed[name] = value


class Series:
    """In SGLang's own registry: the directory of files that its /metrics page collects."""

    def __init__(self, rank: str) -> None:
        from prometheus_client import Counter, Gauge

        replays = Counter(
            "sglang:nsa_plugin_replays",
            "Replays of the draft graph, by who brought the metadata up to date (verified: also compared)",
            ["by", "rank"],
        )
        self.replays = {
            name: replays.labels(by=by, rank=rank)
            for name, by in (("generated", "plugin"), ("own_refreshes", "sglang"), ("verified", "verified"))
        }
        self.left_alone = Counter(
            "sglang:nsa_plugin_left_alone", "Draft workers left to SGLang's own path", ["rank"]
        ).labels(rank=rank)
        self._layout = Gauge(
            "sglang:nsa_plugin_draft_backends",
            "Draft backends served",
            ["layout", "rank"],
            multiprocess_mode="mostrecent",
        )
        self._saved = Gauge(
            "sglang:nsa_plugin_page_table_bytes_saved",
            "Bytes of page tables that are not allocated",
            ["rank"],
            multiprocess_mode="mostrecent",
        ).labels(rank=rank)
        self._rank = rank

    @classmethod
    def create(cls) -> Series | None:
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return None  # SGLang sets it where metrics are on
        try:
            return cls(_rank())
        except Exception as error:
            logger.warning("sglang-nsa-plugin: no Prometheus series: %s", error)
            return None

    def started(self, layout: str, backends: int, saved_bytes: int) -> None:
        self._layout.labels(layout=layout, rank=self._rank).set(backends)
        self._saved.set(saved_bytes)


def _rank() -> str:
    import torch.distributed as dist

    return str(dist.get_rank()) if dist.is_available() and dist.is_initialized() else "0"
