"""Measures models/tiny-nsa with the runtime itself: bits per byte on held-out files, and accept lengths.

    python scripts/measure_tiny_nsa.py [--device cpu|cuda] [--windows 48] [--json FILE]

The held-out files are those of the interpreter's own standard library, chosen by the rule of the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sglang import Engine
from tokenizers import Tokenizer
from tqdm import tqdm

from scripts.tiny_nsa.data import encode_files, read_corpus, token_bytes

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-nsa"
STEPS = 4
NEW_TOKENS = 128


def bits_per_byte(model: Path, device: str, windows: list[list[int]], lengths: list[float]) -> float:
    """Of the tokens after the first of each window, read from its own beginning, by prompt logprobs."""
    nats, size = 0.0, 0.0
    with Engine(model_path=str(model), device=device, dtype="float32") as engine:
        for window in tqdm(windows, desc="bits per byte", unit="window"):
            output = engine.generate(
                input_ids=window,
                sampling_params={"temperature": 0, "max_new_tokens": 1},
                return_logprob=True,
                logprob_start_len=0,
            )
            logprobs = output["meta_info"]["input_token_logprobs"][1:]  # nothing predicts the first token
            nats -= sum(entry[0] for entry in logprobs)
            size += sum(lengths[token] for token in window[1:])
    return nats / math.log(2) / size


def accept_length(device: str, rule: str) -> tuple[float, int]:
    """Tokens per verify over all prompts of held_out.jsonl, greedy, and the number of generated tokens."""
    rows = [json.loads(line) for line in (MODEL / "held_out.jsonl").read_text().splitlines()]
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    options = {"speculative_algorithm": "NEXTN", "speculative_num_steps": STEPS, "nsa_draft_seqlens": rule}
    tokens = 0
    with Engine(model_path=str(MODEL), device=device, dtype="float32", **options) as engine:
        for row in tqdm(rows, desc=f"accept length, {rule}", unit="prompt"):
            tokens += len(engine.generate(row["prompt"], params)["output_ids"])
        state = engine.get_server_info()["internal_states"][0]
    return state["avg_spec_accept_length"], tokens


def dense_copy(folder: Path, window: int) -> Path:
    """The same model with a top-k that selects everything: dense attention."""
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"index_topk": window}))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--windows", type=int, default=48, help="evenly spread over the held-out text")
    parser.add_argument("--window", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    stream = encode_files(tokenizer, read_corpus().held_out).tolist()
    step = (len(stream) - args.window) // max(args.windows - 1, 1)
    windows = [stream[i * step : i * step + args.window] for i in range(args.windows)]
    lengths = token_bytes(tokenizer).tolist()
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "windows": args.windows,
        "window": args.window,
    }
    for rule in ("step", "committed"):
        result[f"accept_length_{rule}"], result["generated_tokens"] = accept_length(args.device, rule)
    result["bits_per_byte_sparse"] = bits_per_byte(MODEL, args.device, windows, lengths)
    with tempfile.TemporaryDirectory() as folder:
        dense = dense_copy(Path(folder) / "dense", args.window)
        result["bits_per_byte_dense"] = bits_per_byte(dense, args.device, windows, lengths)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
