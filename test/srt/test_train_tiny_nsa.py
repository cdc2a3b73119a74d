"""`scripts/train_tiny_nsa.py`, at a size for a CPU: what it writes loads, and a rerun writes the same."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from forked import run_script
from server_fixture import ROOT
from sglang.srt.entrypoints.engine import Engine

# A part of the standard library, and eight steps in all.
CORPUS = Path(sysconfig.get_path("stdlib"), "asyncio")
QUICK = ["--device", "cpu", "--quick", "--scale", "0.012", "--corpus", str(CORPUS)]
PROMPT = "def read_file(path):\n    with open(path) as"


def train(out: Path, *arguments: str) -> tuple[int, str]:
    """The exit status, and what it printed."""
    script = ROOT / "scripts" / "train_tiny_nsa.py"
    return run_script(script, "--out", str(out), *arguments, log=out.with_suffix(".log"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "first"
    status, output = train(out, *QUICK)
    assert status == 0, output
    return out


def test_a_rerun_writes_the_same_weights(trained: Path, tmp_path: Path) -> None:
    status, output = train(tmp_path / "again", *QUICK)
    assert status == 0, output
    for name in ("model.safetensors", "tokenizer.json", "held_out.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes(), name


def test_it_writes_everything_that_it_measured(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    assert list(record["phases"]) == ["dense", "warmup", "sparse", "sparse_long", "mtp", "on_policy"]
    assert all(phase["steps"] >= 1 for phase in record["phases"].values())
    card = (trained / "README.md").read_text()
    assert f"{record['figures']['accept_length_step']:.2f}" in card
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_runtime_continues_as_transformers(trained: Path) -> None:
    """Greedy, speculated with the trained NextN layer."""
    ids = transformers.AutoTokenizer.from_pretrained(trained)(PROMPT).input_ids
    reference = transformers.DeepseekV32ForCausalLM.from_pretrained(
        trained, dtype=torch.float32, attn_implementation="eager"
    )
    expected = reference.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    options = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 4}
    with Engine(model_path=str(trained), device="cpu", dtype="float32", **options) as engine:
        params = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        output = engine.generate(input_ids=ids, sampling_params=params)
    assert output["output_ids"] == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("scale", ["0", "-1"])
def test_a_scale_that_is_not_positive_is_refused(scale: str, tmp_path: Path) -> None:
    status, output = train(tmp_path / "none", "--scale", scale)
    assert status == 2 and f"--scale must be positive, got {float(scale)}" in output
