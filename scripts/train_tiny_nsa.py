#!/usr/bin/env python3
"""Trains ``models/tiny-nsa`` from nothing: a small DeepSeek-V3.2 model of Python source with an MTP layer.

    python scripts/train_tiny_nsa.py --out models/tiny-nsa             # one GPU, under 8 minutes
    python scripts/train_tiny_nsa.py --out /tmp/t --device cpu --quick  # a tiny one, to see that it runs

Needs torch, tokenizers, safetensors, numpy, tqdm and matplotlib.
"""

import argparse
import logging
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tiny_nsa.card import write_card
from tiny_nsa.config import ModelConfig
from tiny_nsa.data import (
    PROMPT_LENGTHS,
    Crops,
    encode_files,
    held_out_prompts,
    read_corpus,
    token_bytes,
    train_tokenizer,
    write_jsonl,
)
from tiny_nsa.evaluate import accept_length, bits_per_byte, generate
from tiny_nsa.export import load_model, save_curve, save_model, save_tokenizer, write_json
from tiny_nsa.model import TinyNSA
from tiny_nsa.phases import DRAFT_STEPS, PHASES, TOPK_MARGIN, Trainer, quick_phases, scaled
from tokenizers import Tokenizer

logger = logging.getLogger("train_tiny_nsa")
NEW_TOKENS = 128  # decoded per prompt for the accept length
QUICK_NEW_TOKENS = 12
SAMPLE_PROMPT = "def main():\n    import argparse\n    parser = argparse.ArgumentParser()\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--corpus", type=Path, help="a standard library's folder (default: this Python's own)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on every phase's number of steps (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny widths and windows, for a CPU")
    args = parser.parse_args()
    if args.scale <= 0:
        parser.error(f"--scale must be positive, got {args.scale}")
    return args


def measure(
    out: Path, tokenizer: Tokenizer, held_out: torch.Tensor, prompts: list[dict[str, object]], new_tokens: int
) -> dict:
    """The figures of the saved checkpoint, in float32 with its BF16 weights."""
    device = held_out.device
    model = load_model(out, device)
    sizes = token_bytes(tokenizer).to(device)
    half = model.config.max_position_embeddings // 2
    figures: dict[str, float] = {}
    for length in (half, 2 * half):
        for mode in ("dense", "sparse"):
            figures[f"bits_per_byte_{mode}_{length}"] = bits_per_byte(model, held_out, sizes, length, mode)
    ids = [tokenizer.encode(str(row["prompt"])).ids for row in prompts]
    ids = [
        row[-max(n for n in PROMPT_LENGTHS if n <= len(row)) :]
        for row in ids
        if len(row) >= min(PROMPT_LENGTHS)
    ]
    for rule, value in accept_length(model, ids, new_tokens, DRAFT_STEPS, ("step", "committed")).items():
        figures[f"accept_length_{rule}"] = value
    figures = {name: round(value, 4) for name, value in figures.items()}
    how = f"{new_tokens} new tokens for each of the {len(ids)} prompts of `held_out.jsonl`"
    sample = torch.tensor([tokenizer.encode(SAMPLE_PROMPT).ids], device=device)
    return {
        **figures,
        "accept_length_prompts": how,
        "sample": tokenizer.decode(generate(model, sample, min(96, new_tokens))[0].tolist()),
    }


def repeatable(seed: int) -> None:
    """The same text, torch and device give the same weights, bit by bit."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it did not write


def main() -> None:
    args = arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    began = time.monotonic()
    device = torch.device(args.device)
    repeatable(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)

    config = ModelConfig().quick() if args.quick else ModelConfig()
    corpus = read_corpus(args.corpus, 2_000_000 if args.quick else None)
    tokenizer = train_tokenizer(corpus, config.vocab_size)
    save_tokenizer(tokenizer, config, args.out)
    train = encode_files(tokenizer, corpus.train)
    held_out = encode_files(tokenizer, corpus.held_out).to(device)
    lengths = PROMPT_LENGTHS if not args.quick else (32, 64)
    prompts = held_out_prompts(tokenizer, corpus, 8 if args.quick else 64, NEW_TOKENS, lengths, args.seed)
    write_jsonl(args.out / "held_out.jsonl", prompts)
    logger.info(
        "%d training files, %.1f MB, %.1f M tokens; %d held out, %.2f MB; %.0f s",
        len(corpus.train), corpus.train_bytes / 1e6, len(train) / 1e6,
        len(corpus.held_out), corpus.held_out_bytes / 1e6, time.monotonic() - began,
    )  # fmt: skip

    model = TinyNSA(replace(config, index_topk=config.index_topk // TOPK_MARGIN)).to(device)
    if device.type == "cuda":
        from torch._inductor import config as inductor_config  # which takes seconds

        torch._dynamo.config.recompile_limit = 64  # each phase is a variant of the same layers
        # sums over heads become plain additions: as short reductions they would be slow kernels, since a
        # deterministic compiler does not try out which configuration is fast
        inductor_config.unroll_reductions_threshold = 1 + max(
            config.num_attention_heads, config.index_n_heads
        )
        for layer in [*model.layers, model.nextn.layer]:
            layer.compile(dynamic=False)
    crops = Crops(train, device, args.seed)
    phases = scaled(quick_phases() if args.quick else PHASES, args.scale)
    trainer = Trainer(model, crops, held_out, token_bytes(tokenizer).to(device), phases)
    trainer.run()
    save_model(model, config, args.out)
    save_curve(trainer.history, args.out / "loss.png")

    read, new_tokens = (4_000, QUICK_NEW_TOKENS) if args.quick else (None, NEW_TOKENS)
    figures = measure(args.out, tokenizer, held_out[:read], prompts, new_tokens)
    record = {
        "figures": figures,
        "windows": "all windows",
        "phases": trainer.took,
        "corpus": {
            "python": args.corpus.name.removeprefix("cpython-") if args.corpus else platform.python_version(),
            "train_files": len(corpus.train),
            "train_bytes": corpus.train_bytes,
            "train_tokens": len(train),
            "held_out_files": len(corpus.held_out),
            "held_out_bytes": corpus.held_out_bytes,
            "held_out_tokens": len(held_out),
        },
        "parameters": sum(w.numel() for w in model.parameters()),
        "seed": args.seed,
        "scale": args.scale,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "wall_seconds": round(time.monotonic() - began, 1),
    }
    write_json(args.out / "training.json", record)
    write_card(args.out, record, config, DRAFT_STEPS)
    for name, value in figures.items():
        logger.info("%s: %s", name, value)
    logger.info("wrote %s, %d bytes", args.out, sum(f.stat().st_size for f in args.out.iterdir()))


if __name__ == "__main__":
    main()
