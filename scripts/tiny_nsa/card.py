# ruff: noqa: E501 (the card is written as it is read)
"""The model card, written from what was measured."""

from pathlib import Path

from .config import ModelConfig
from .data import HELD_OUT_ONE_IN, MAX_FILE_BYTES

RUNTIME_SECTION = "## Measured by the runtime"

CARD = """---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [code, python, sparse-attention, mtp, speculative-decoding]
widget:
  - example_title: a program's main
    text: |
      def main():
          import argparse
          parser = argparse.ArgumentParser()
  - example_title: an optional import
    text: |-
      try:
          import json
      except
---
# tiny-nsa

A small `DeepseekV32ForCausalLM` that continues Python source. It has every part of the architecture at a size that
serves on two CPU cores: MLA, the lightning indexer with top-{c.index_topk} sparse attention, a mixture of experts with
a shared expert, and one NextN (MTP) layer trained to draft {draft_steps} tokens ahead.

It is a model to run, test and benchmark a server with. It has read nothing but the Python standard library, knows no
facts and follows no instructions; what it writes looks like Python and is often wrong.

## Shape
| | |
|---|---|
| parameters | {parameters:,} ({stored:,} stored: the NextN layer repeats the embedding and the head, as DeepSeek does) |
| layers | {c.num_hidden_layers} (the first {c.first_k_dense_replace} dense) + 1 NextN, hidden {c.hidden_size}, {c.num_attention_heads} heads |
| MLA | q_lora {c.q_lora_rank}, kv_lora {c.kv_lora_rank}, nope {c.qk_nope_head_dim}, rope {c.qk_rope_head_dim}, v {c.v_head_dim} |
| indexer | {c.index_n_heads} heads of {c.index_head_dim}, top-{c.index_topk} |
| experts | {c.n_routed_experts} routed, {c.num_experts_per_tok} per token, {c.n_shared_experts} shared, width {c.moe_intermediate_size} |
| context | {c.max_position_embeddings} tokens |
| tokenizer | byte-level BPE of {c.vocab_size} entries, all 256 bytes among them: every text comes back unchanged |
| weights | BF16 (the experts' selection biases fp32), {bytes_model:,} bytes |

## Text
- Source: the `.py` files of the standard library of Python {corpus[python]} (tests included; without `encodings`,
  `lib2to3`, files above {max_kb} kB, files that are not UTF-8 and copies of other files).
- Training: {corpus[train_files]:,} files, {train_mb:.1f} MB, {train_mtok:.1f} M tokens. Held out: {corpus[held_out_files]} files, {held_mb:.2f} MB.
- Split rule: a file is held out if the first 8 bytes of the sha256 of its path relative to the library's folder, as a
  big-endian number, are divisible by {one_in}.
- Licence of the text: Python Software Foundation License Version 2 (https://docs.python.org/3/license.html). The
  weights are derived from it and carry the same licence; the training script is Apache-2.0 like the rest of the project.

`held_out.jsonl` has {prompts} prompts cut from held-out files, with each file's own continuation; tests and benchmarks
use them.

## Figures of the training script
Bits per byte of the saved BF16 weights in float32, {windows} of held-out text, each read from its own beginning:

| window | dense attention | sparse, top-{c.index_topk} |
|---|---|---|
{bpb_rows}

{accept_text}

{runtime_section}
Not measured for these weights yet.

## Training
![loss curve](loss.png)

| phase | what | steps | tokens (M) | seconds |
|---|---|---|---|---|
{phase_rows}

One {device}, torch {torch}, seed {seed}; {wall_seconds:.0f} s from reading the text to the last measurement. Steps and
seeds are fixed, and torch runs its deterministic algorithms: the same text, torch and GPU give the same weights.

```
python scripts/train_tiny_nsa.py --out models/tiny-nsa{options}
```

The layers' code is `scripts/tiny_nsa/`. Everything that was recorded is in `training.json`. What these weights
make of a prompt, greedily (the script's `SAMPLE_PROMPT`):

```python
{sample}
```
"""

ACCEPT_TEXT = """\
Accept length (tokens per verify, the bonus token included), greedy, {draft_steps} speculative steps, {accept_length_prompts}:

| draft lengths | accept length |
|---|---|
| `step` | {accept_length_step:.2f} |
| `committed` | {accept_length_committed:.2f} |

The script decodes greedily, drafts from every position at once as serving does from one, and counts."""

PHASE_TEXT = {
    "dense": "main model, dense attention; the MTP layer's first step with weight 0.3",
    "warmup": "the indexers alone learn the dense attention distribution",
    "sparse": "everything, top-k attention (half as many keys as in use); the indexers go on learning",
    "sparse_long": "the same, windows of 4096",
    "mtp": "the MTP layer alone, four steps on its own output, towards the target's predictions",
    "on_policy": "the same; three batches of four end in text that the model wrote",
}


def write_card(out: Path, record: dict, config: ModelConfig, draft_steps: int) -> None:
    """Writes ``README.md`` beside the checkpoint from the record that ``training.json`` holds."""
    figures, corpus, phases = record["figures"], record["corpus"], record["phases"]
    lengths = [int(n.rsplit("_", 1)[1]) for n in figures if n.startswith("bits_per_byte_dense_")]
    bpb = [
        f"| {n} tokens | {figures[f'bits_per_byte_dense_{n}']:.3f} | {figures[f'bits_per_byte_sparse_{n}']:.3f} |"
        for n in lengths
    ]
    rows = [
        f"| {name} | {PHASE_TEXT[name]} | {p['steps']:,} | {p['tokens'] / 1e6:.1f} | {p['seconds']:.0f} |"
        for name, p in phases.items()
    ]
    card = CARD.format(
        c=config,
        windows=record["windows"],
        accept_text=ACCEPT_TEXT.format(draft_steps=draft_steps, **figures),
        corpus=corpus,
        draft_steps=draft_steps,
        parameters=record["parameters"],
        stored=record["parameters"] + 2 * config.vocab_size * config.hidden_size,
        bytes_model=(out / "model.safetensors").stat().st_size,
        max_kb=MAX_FILE_BYTES // 1024,
        train_mb=corpus["train_bytes"] / 1e6,
        train_mtok=corpus["train_tokens"] / 1e6,
        held_mb=corpus["held_out_bytes"] / 1e6,
        one_in=HELD_OUT_ONE_IN,
        prompts=len((out / "held_out.jsonl").read_text().splitlines()),
        bpb_rows="\n".join(bpb),
        phase_rows="\n".join(rows),
        runtime_section=RUNTIME_SECTION,
        device=record["device"],
        torch=record["torch"],
        seed=record["seed"],
        wall_seconds=record["wall_seconds"],
        options="" if record["scale"] == 1 else f" --scale {record['scale']:g}",
        sample=figures["sample"].strip(),
    )
    (out / "README.md").write_text(card)
