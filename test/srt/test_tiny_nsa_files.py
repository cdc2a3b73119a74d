"""The shipped model: what its files hold, its tokenizer, and its logits beside transformers'."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_loader import load_model
from tiny_models import PagedDriver
from transformers.utils import logging as transformers_logging

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-nsa"
MAX_BYTES = 12_000_000
SHA256 = {
    "model.safetensors": "5eb2e08574f92f13e09616c63b70f9317800fb1c859dd83851a0cfffc1860cae",
    "tokenizer.json": "afad78ca01de52619791eacaaaa5153a65bc7db711fb78d8a0612ccbcd725f19",
    "held_out.jsonl": "18830b761d9ffa42d4ec50ba32a38ee2d0f35b256628462257c5f65805f7f424",
}
SNIPPET_TOKENS = 420  # well above index_topk, so that the indexer decides


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, object]]:
    return [json.loads(line) for line in (MODEL / "held_out.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def snippet(tokenizer: transformers.PreTrainedTokenizerFast, held_out: list[dict[str, object]]) -> list[int]:
    text = next(str(row["prompt"]) for row in held_out if row["prompt_tokens"] >= SNIPPET_TOKENS)
    return tokenizer(text).input_ids[:SNIPPET_TOKENS]


@pytest.fixture(scope="module")
def reference() -> transformers.DeepseekV32ForCausalLM:
    transformers_logging.set_verbosity_error()  # its report lists the NextN layer, which it does not load
    model, report = transformers.DeepseekV32ForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    nextn = f"model.layers.{model.config.num_hidden_layers}."
    assert not report["missing_keys"]
    assert all(key.startswith(nextn) for key in report["unexpected_keys"])
    return model.eval()


def test_all_files_together_stay_small() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= MAX_BYTES


@pytest.mark.parametrize("name", SHA256)
def test_files_are_those_that_were_measured(name: str) -> None:
    assert hashlib.sha256((MODEL / name).read_bytes()).hexdigest() == SHA256[name]


def test_weights_are_bf16_under_deepseek_names() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV32ForCausalLM"]
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    for name, tensor in tensors.items():
        wanted = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert tensor.dtype == wanted, name
        assert tensor.isfinite().all(), name
    nextn = f"model.layers.{config['num_hidden_layers']}."
    assert torch.equal(tensors[nextn + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[nextn + "shared_head.head.weight"], tensors["lm_head.weight"])
    assert tensors[nextn + "eh_proj.weight"].shape == (config["hidden_size"], 2 * config["hidden_size"])


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=200))
def test_tokenizer_brings_every_text_back(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_every_byte_has_a_token(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    alphabet = {token for token in tokenizer.get_vocab() if len(token) == 1}
    assert len(alphabet) == 256


def test_chat_template_makes_comments_of_the_user(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "Add two\nnumbers."},
        {"role": "assistant", "content": "def add(a, b):"},
        {"role": "user", "content": "Now more."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "# Add two\n# numbers.\ndef add(a, b):\n\n# Now more.\n"


def test_held_out_prompts_are_what_they_say(
    tokenizer: transformers.PreTrainedTokenizerFast, held_out: list[dict[str, object]]
) -> None:
    assert len(held_out) == 64
    for row in held_out:
        digest = hashlib.sha256(str(row["file"]).encode()).digest()
        assert int.from_bytes(digest[:8], "big") % 50 == 0, row["file"]
        assert len(tokenizer(row["prompt"]).input_ids) == row["prompt_tokens"]
        assert row["continuation"]


def topk_by_position(
    scores: torch.Tensor, k: int, dim: int = -1, **_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Tensor.topk`, lower columns first among equals as in the runtime; torch leaves that open."""
    values, indices = scores.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def test_runtime_equals_transformers(
    reference: transformers.DeepseekV32ForCausalLM, snippet: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The indexer's relu gives many keys the score 0, so equal scores do meet at the top-k's edge.
    monkeypatch.setattr(torch.Tensor, "topk", topk_by_position)
    with torch.no_grad():
        theirs = reference(torch.tensor([snippet])).logits[0]  # [T, vocab], float32
    monkeypatch.undo()
    config = ModelConfig.from_path(str(MODEL), dtype="float32")
    model, nextn = load_model(config)
    assert nextn is not None
    driver = PagedDriver(config, config.num_hidden_layers, pages=SNIPPET_TOKENS // 4 + 1)
    ours = driver.run(model, [(1, 0, snippet)], ForwardMode.EXTEND)
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-4


def test_reads_held_out_source_well(
    reference: transformers.DeepseekV32ForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    snippet: list[int],
) -> None:
    with torch.no_grad():
        logits = reference(torch.tensor([snippet])).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(snippet[1:]), reduction="sum").item()
    size = len(tokenizer.decode(snippet[1:]).encode())
    assert nats / math.log(2) / size < 1.6
