"""The shipped model in the runtime: what it says, and that its drafts are accepted."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from server_fixture import ROOT
from sglang.srt.entrypoints.engine import Engine

MODEL = ROOT / "models" / "tiny-nsa"
GREEDY = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
ACCEPT_LENGTH_FLOOR = 2.5  # tokens per verify with 4 steps, the bonus token included
PROMPT = "def read_file(path):\n    with open(path) as"
EXPECTED = ' f:\n        f.write(b"\\n") as f:\n'  # its closest call is by 0.12 in the logits


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    options = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 4}
    with Engine(model_path=str(MODEL), device="cpu", dtype="float32", **options) as engine:
        yield engine


def test_accept_length_on_held_out_prompts(engine: Engine) -> None:
    rows = [json.loads(line) for line in (MODEL / "held_out.jsonl").read_text().splitlines()]
    outputs = engine.generate([row["prompt"] for row in rows[:8]], GREEDY)
    tokens = sum(output["meta_info"]["completion_tokens"] for output in outputs)
    verifies = sum(output["meta_info"]["spec_verify_ct"] for output in outputs)
    assert tokens / verifies > ACCEPT_LENGTH_FLOOR


def test_greedy_output_is_deterministic(engine: Engine) -> None:
    """The text itself is pinned: a change of weights or of arithmetic shows."""
    first = engine.generate(PROMPT, GREEDY)
    engine.flush_cache()
    assert engine.generate(PROMPT, GREEDY)["output_ids"] == first["output_ids"]
    assert first["text"].startswith(EXPECTED)
