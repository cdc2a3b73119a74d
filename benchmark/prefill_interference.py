"""How much arriving prompts slow down requests that decode, by the burst that prefill is allowed.

    python benchmark/prefill_interference.py --model-path models/tiny-nsa --device cuda --rates 5 50

Some requests decode; their time per token is measured while prompts arrive at a fixed rate, each answered
with one token, and alone: before and after, since it grows with their length. Where the rate is high enough
to use up the burst, that comes first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from profile_step import random_prompts
from sglang import Engine
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.managers.prefill_budget import PrefillBudget
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs


@dataclass
class Measurement:
    burst: float | None  # --prefill-burst; None: no limit
    rate: float  # prompts a second
    alone_ms: float  # per token, mean of the running requests
    arriving_ms: float
    ratio: float
    longest_wait_ms: float  # between two tokens of a running request, while prompts arrive
    prompts: int  # answered meanwhile
    median_ttft_ms: float


class Load:
    """Requests that decode for as long as they are watched, and prompts beside them."""

    def __init__(self, args: argparse.Namespace) -> None:
        flags = ["--model-path", args.model_path, "--device", args.device, *args.server_flags]
        flags += ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(args.steps)]
        flags += ["--chunked-prefill-size", str(args.chunk), "--disable-radix-cache"]
        self.engine = Engine(server_args=ServerArgs.from_cli(flags))
        self.scheduler = self.engine.scheduler
        self.sent = 0
        self.args = args

    def send(self, prompt: list[int], new_tokens: int) -> str:
        self.sent += 1
        params = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)
        rid = f"r{self.sent}"
        self.engine.link.inbox.append(
            TokenizedGenerateReqInput(rid=rid, input_ids=prompt, sampling_params=params)
        )
        return rid

    def step(self) -> list[Any]:
        """One step; what it has answered."""
        self.scheduler.step()
        messages = [self.engine.link.outbox.popleft() for _ in range(len(self.engine.link.outbox))]
        return [output for message in messages for output in message.outputs]

    def drop_prompts(self, kept: list[Req]) -> None:
        """Ends all requests but those."""
        rids = self.scheduler.requests.keys() - {req.rid for req in kept}
        self.scheduler.handle(AbortReq(list(rids)))

    def start(self, count: int, burst: float | None) -> list[Req]:
        """Ends whatever there is, and starts anew."""
        self.drop_prompts([])
        self.scheduler.prefill_budget = PrefillBudget(burst)
        for prompt in random_prompts(count, self.args.prompt_len, self.scheduler.worker.vocab_size):
            self.send(prompt, self.args.max_new_tokens)
        while len(self.scheduler.running) < count:
            self.step()
        for _ in range(20):
            self.step()
        return list(self.scheduler.running)

    def watch(
        self, reqs: list[Req], seconds: float, rate: float, until_overdrawn: bool = False
    ) -> tuple[float, float, list[float]]:
        """ms per token and longest wait of `reqs`, and the ms to the first token of prompts that arrive
        `rate` times a second."""
        vocab = self.scheduler.worker.vocab_size
        prompts = random_prompts(64, self.args.arriving_len, vocab)
        before, began = [len(req.output_ids) for req in reqs], time.perf_counter()
        sent: dict[str, float] = {}
        ttft: list[float] = []
        last, counts, longest = [began] * len(reqs), list(before), 0.0
        while (now := time.perf_counter()) < began + seconds:
            while rate and len(sent) < (now - began) * rate:
                sent[self.send(prompts[len(sent) % len(prompts)], 1)] = now
            answered = self.step()
            if until_overdrawn and not self.scheduler.prefill_budget.allows_pass:
                break
            now = time.perf_counter()
            ttft += [now - sent[output.rid] for output in answered if output.rid in sent]
            for i, req in enumerate(reqs):
                if len(req.output_ids) > counts[i]:
                    longest, last[i], counts[i] = max(longest, now - last[i]), now, len(req.output_ids)
                if req.finish_reason is not None:
                    raise SystemExit("a request ended: --max-new-tokens is too small")
        tokens = statistics.mean(count - start for count, start in zip(counts, before))
        return (time.perf_counter() - began) / max(tokens, 1) * 1e3, longest * 1e3, [t * 1e3 for t in ttft]


def measure(load: Load, burst: float | None, rate: float) -> Measurement:
    args = load.args
    reqs = load.start(args.running, burst)
    before, _, _ = load.watch(reqs, args.seconds / 2, 0)
    if burst:
        load.watch(reqs, args.seconds + 2 * burst, rate, until_overdrawn=True)
    arriving, longest, ttft = load.watch(reqs, args.seconds, rate)
    load.drop_prompts(reqs)
    after, _, _ = load.watch(reqs, args.seconds / 2, 0)
    alone = (before + after) / 2
    median = statistics.median(ttft) if ttft else float("nan")
    return Measurement(burst, rate, alone, arriving, arriving / alone, longest, len(ttft), median)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-path", required=True)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--steps", type=int, default=4, help="speculative steps")
    add("--running", type=int, default=4, help="requests that decode")
    add("--prompt-len", type=int, default=64, help="of these")
    add("--arriving-len", type=int, default=1000, help="tokens of each prompt that arrives")
    add("--rates", type=float, nargs="+", default=[5.0, 50.0], help="prompts a second")
    add("--chunk", type=int, default=512, help="--chunked-prefill-size")
    add("--seconds", type=float, default=3.0, help="of each measurement")
    add("--max-new-tokens", type=int, default=3800, help="of the requests that decode")
    add("--json", type=Path, help="also write the figures here")
    add("--server-flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the engines")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    load = Load(args)
    load.watch(load.start(args.running, None), args.seconds / 4, args.rates[0])  # compiles what prompts need
    print(
        "| burst s | prompts/s | ms a token | with arrivals | ratio | longest wait ms | answered | TTFT ms |"
    )
    print("|---" * 8 + "|")
    rows = []
    for rate, burst in product(args.rates, (None, ServerArgs.prefill_burst, 0.0)):
        m = measure(load, burst, rate)
        rows.append(asdict(m))
        print(
            f"| {'no limit' if burst is None else burst} | {rate:g} | {m.alone_ms:.3f} | {m.arriving_ms:.3f} "
            f"| {m.ratio:.2f} | {m.longest_wait_ms:.1f} | {m.prompts} | {m.median_ttft_ms:.1f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
