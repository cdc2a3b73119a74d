"""Our DeepSeek-V3.2 against transformers': logits and selected keys of prefill, chunks and decode."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_loader import load_model
from tiny_models import (
    ModelCase,
    PagedDriver,
    deepseek_names,
    nextn_names,
    reference_model,
    save_checkpoint,
    transformers,
)

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}

CASES = [
    ModelCase("default"),
    ModelCase("shorter_than_topk", context=12),
    ModelCase("long", context=150, overrides={"num_hidden_layers": 2}),
    ModelCase("yarn_deepseek", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    ModelCase("yarn_two_mscales", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    ModelCase("yarn_without_mscale", {"rope_parameters": YARN}),
    ModelCase("yarn_no_truncate", {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.1}}),
    ModelCase("dense_only", {"first_k_dense_replace": 3}),
    ModelCase("moe_only_one_group", {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}),
    ModelCase("two_shared_no_renorm", {"n_shared_experts": 2, "norm_topk_prob": False}),
    ModelCase("attention_bias", {"attention_bias": True}),
    ModelCase("tied", {"tie_word_embeddings": True}),
    ModelCase("wide_index", {"index_n_heads": 12, "index_head_dim": 8, "index_topk": 5}),
]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def token_ids(case: ModelCase, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(case.seed + 100)
    return torch.randint(0, case.config["vocab_size"], (count,), generator=generator).tolist()


class Reference:
    """transformers' logits [T, vocab] and selected sets of one sequence."""

    def __init__(self, model: torch.nn.Module, **inputs: torch.Tensor) -> None:
        chosen: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.indexer.register_forward_hook(lambda _m, _a, out: chosen.append(out[0]))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            self.logits = model(**inputs, use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        # A row may pick keys that it must not see when it sees fewer than topk; they are masked later.
        self.selected = [
            [{p for p in row if p <= t} for t, row in enumerate(layer.tolist())] for layer in chosen
        ]


def assert_rows_equal(driver: PagedDriver, logits: torch.Tensor, reference: Reference, first: int) -> None:
    rows = slice(first, first + logits.shape[0])
    assert [layer[rows] for layer in reference.selected] == driver.selected
    assert relative_error(logits, reference.logits[rows]) < 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prefill_chunks_and_decode_equal_transformers(case: ModelCase, tmp_path: Path) -> None:
    theirs = reference_model(case)
    theirs.save_pretrained(tmp_path)  # transformers writes the files, we read them
    config = ModelConfig.from_path(str(tmp_path), dtype="float32")
    ours, nextn = load_model(config)
    assert nextn is None
    ids = token_ids(case, case.context)
    reference = Reference(theirs, input_ids=torch.tensor([ids]))

    driver = PagedDriver(config, config.num_hidden_layers)
    logits = driver.run(ours, [(1, 0, ids)], ForwardMode.EXTEND)
    assert_rows_equal(driver, logits, reference, 0)

    for start, end in ((0, 5), (5, 6), (6, case.context - 4)):
        logits = driver.run(ours, [(2, start, ids[start:end])], ForwardMode.EXTEND)
        assert_rows_equal(driver, logits, reference, start)
    for position in range(case.context - 4, case.context):
        logits = driver.run(ours, [(2, position, [ids[position]])], ForwardMode.DECODE)
        assert_rows_equal(driver, logits, reference, position)


def test_every_token_decoded_from_the_first(tmp_path: Path) -> None:
    case = ModelCase("token_by_token", context=40, seed=3)
    theirs = reference_model(case)
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.from_path(str(tmp_path), dtype="float32")
    ours, _ = load_model(config)
    ids = token_ids(case, case.context)
    reference = Reference(theirs, input_ids=torch.tensor([ids]))
    driver = PagedDriver(config, config.num_hidden_layers)
    for position, token in enumerate(ids):
        logits = driver.run(ours, [(1, position, [token])], ForwardMode.DECODE)
        assert_rows_equal(driver, logits, reference, position)


def test_a_ragged_batch_equals_each_request_alone(tmp_path: Path) -> None:
    case = ModelCase("batch", seed=4)
    theirs = reference_model(case)
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.from_path(str(tmp_path), dtype="float32")
    ours, _ = load_model(config)
    sequences = [token_ids(ModelCase("", seed=i), length) for i, length in enumerate((37, 3, 20))]
    references = [Reference(theirs, input_ids=torch.tensor([ids])) for ids in sequences]
    driver = PagedDriver(config, config.num_hidden_layers)
    rows = [(i + 1, 0, ids[:-1]) for i, ids in enumerate(sequences)]
    logits = driver.run(ours, rows, ForwardMode.EXTEND)
    want = torch.cat([reference.logits[:-1] for reference in references])
    assert relative_error(logits, want) < 1e-4
    rows = [(i + 1, len(ids) - 1, ids[-1:]) for i, ids in enumerate(sequences)]
    logits = driver.run(ours, rows, ForwardMode.DECODE)
    assert relative_error(logits, torch.stack([reference.logits[-1] for reference in references])) < 1e-4


def test_deepseek_rope_scaling_is_read_like_rope_parameters(tmp_path: Path) -> None:
    """DeepSeek's own config.json: rope_scaling with "type", beside rope_theta and without a rope_type."""
    case = ModelCase("ds", {"rope_parameters": YARN | {"mscale": 0.9, "mscale_all_dim": 1.0}}, seed=5)
    theirs = reference_model(case)
    raw = {k: v for k, v in case.config.items() if k != "rope_parameters"}
    scaling = {
        k: v for k, v in case.config["rope_parameters"].items() if k not in ("rope_type", "rope_theta")
    }
    raw |= {"rope_theta": 10000, "rope_scaling": scaling | {"type": "yarn"}}
    save_checkpoint(tmp_path, raw, deepseek_names(theirs), shards=3)
    config = ModelConfig.from_path(str(tmp_path), dtype="float32")
    ours, _ = load_model(config)
    ids = token_ids(case, case.context)
    driver = PagedDriver(config, config.num_hidden_layers)
    logits = driver.run(ours, [(1, 0, ids)], ForwardMode.EXTEND)
    assert_rows_equal(driver, logits, Reference(theirs, input_ids=torch.tensor([ids])), 0)


@pytest.mark.parametrize("sparse", [True, False], ids=["moe", "dense"])
def test_nextn_layer_equals_a_transformers_layer(sparse: bool, tmp_path: Path) -> None:
    """transformers has no NextN layer, but that layer is a one-layer model fed with embeddings."""
    dense_layers = 1 if sparse else 3
    case = ModelCase("target", {"first_k_dense_replace": dense_layers, "num_hidden_layers": 2}, seed=6)
    layer_case = ModelCase(
        "nextn", {"num_hidden_layers": 1, "first_k_dense_replace": 0 if sparse else 1}, seed=7
    )
    target, layer = reference_model(case), reference_model(layer_case)
    tensors = nextn_names(layer, layer=2, seed=8)
    raw = case.config | {"num_nextn_predict_layers": 1}
    save_checkpoint(tmp_path, raw, deepseek_names(target) | tensors)
    config = ModelConfig.from_path(str(tmp_path), dtype="float32")
    _, ours = load_model(config)
    assert ours is not None

    ids = token_ids(case, case.context)
    hidden = torch.randn(case.context, config.hidden_size, generator=torch.Generator().manual_seed(9))
    norm = torch.nn.functional.rms_norm
    size = (config.hidden_size,)
    embedded = norm(target.model.embed_tokens.weight[ids], size, tensors["model.layers.2.enorm.weight"], 1e-6)
    previous = norm(hidden, size, tensors["model.layers.2.hnorm.weight"], 1e-6)
    x = torch.cat((embedded, previous), dim=-1) @ tensors["model.layers.2.eh_proj.weight"].T
    layer.lm_head.weight = target.lm_head.weight
    reference = Reference(layer, inputs_embeds=x[None].detach())

    driver = PagedDriver(config, layers=1)
    logits = driver.run(ours, [(1, 0, ids[:-2])], ForwardMode.EXTEND, hidden[:-2])
    assert_rows_equal(driver, logits, reference, 0)
    # Of all rows the keys, of each request's last row all: two requests at once, then one on its own.
    extend, short = ForwardMode.EXTEND, ids[:3]
    both = torch.cat((hidden[:20], hidden[:3]))
    logits = driver.run(ours, [(2, 0, ids[:20]), (3, 0, short)], extend, both, last_only=True)
    assert driver.selected == [[layer[19], layer[2]] for layer in reference.selected]
    assert relative_error(logits, reference.logits[[19, 2]]) < 1e-4
    logits = driver.run(ours, [(2, 20, ids[20:-2])], extend, hidden[20:-2], last_only=True)
    assert_rows_equal(driver, logits, reference, case.context - 3)
    for request, position in product((1, 2), (case.context - 2, case.context - 1)):
        row = [(request, position, [ids[position]])]
        logits = driver.run(ours, row, ForwardMode.DECODE, hidden[position : position + 1])
        assert_rows_equal(driver, logits, reference, position)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    # Every key selected and no experts: rounding cannot flip a choice.
    case = ModelCase("bf16", {"index_topk": 64, "first_k_dense_replace": 3})
    reference_model(case).save_pretrained(tmp_path)
    ids = token_ids(case, case.context)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        config = ModelConfig.from_path(str(tmp_path), dtype=dtype)
        model, _ = load_model(config)
        assert model.model.layers[0].self_attn.indexer.weights_proj.weight.dtype == torch.float32
        driver = PagedDriver(config, config.num_hidden_layers)
        logits[dtype] = driver.run(model, [(1, 0, ids)], ForwardMode.EXTEND)
    difference = (logits["bfloat16"] - logits["float32"]).norm() / logits["float32"].norm()
    assert difference < 0.1


def test_rope_tables_of_deepseeks_own_config() -> None:
    from sglang.srt.layers.rotary import RotaryEmbedding
    from sglang.srt.model_config import RopeConfig

    scaling = {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
    theirs_config = transformers.DeepseekV32Config(
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "beta_fast": 32, "beta_slow": 1}
        | scaling
    )
    from transformers.models.deepseek_v32 import modeling_deepseek_v32

    theirs = modeling_deepseek_v32.DeepseekV32RotaryEmbedding(theirs_config)
    rope = RopeConfig(rope_type="yarn", **scaling)
    positions = torch.tensor([0, 1, 77, 4096, 65537, 163839])
    rotation = RotaryEmbedding(rope, 64, "cpu")(positions)[:, 0]
    their_cos, their_sin = theirs(torch.zeros(1), positions[None])
    assert torch.equal(rotation.real, their_cos[0, :, :32])
    assert torch.equal(rotation.imag, their_sin[0, :, :32])
    their_scale = modeling_deepseek_v32.yarn_apply_mscale(theirs_config.rope_parameters, 192**-0.5)
    assert ModelConfig(rope=rope).softmax_scale == pytest.approx(their_scale, rel=1e-12)
