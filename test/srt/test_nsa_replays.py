"""A simulated continuous batch: every replay of every path is verified.

`python -m sglang.bench_metadata --soak 100000` is the same at full length.
"""

from __future__ import annotations

import pytest
import torch
from nsa_cases import DEVICES, wrap_run
from sglang.benchmark_metadata.soak import BATCH_SIZES, soak
from sglang.srt.layers.attention.nsa.metadata_check import MetadataMismatchError
from sglang.srt.layers.attention.nsa.metadata_generators import FusedGenerator
from sglang.srt.layers.attention.nsa.replicate import FusedReplication


@pytest.mark.parametrize("device", DEVICES)
def test_three_thousand_replays(device):
    report = soak(3000, torch.device(device), seed=11)
    assert report.replays >= 3000
    assert report.fallbacks == 0
    # The simulation has to be worth something.
    assert report.idle_steps > 10
    assert report.reused_slots > 100
    assert report.departures > 100
    assert report.largest_length > 480
    assert report.batch_sizes == set(range(BATCH_SIZES[-1] + 1))


def test_a_stale_replay_is_found(monkeypatch):
    """The generation skips one replay in two hundred, as a lost update would."""
    calls = []

    def forgetful(run):
        def wrapped(max_len: int) -> None:
            calls.append(max_len)
            if len(calls) % 200:
                run(max_len)

        return wrapped

    wrap_run(monkeypatch, FusedGenerator, forgetful)
    wrap_run(monkeypatch, FusedReplication, forgetful)
    with pytest.raises(MetadataMismatchError, match="stale or wrong metadata"):
        soak(3000, torch.device("cpu"))
