"""`python -m sglang_nsa doctor | bench`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .settings import BACKENDS

DECODE = ["flashmla_sparse", "flashmla_kv"]
PAGE_SIZE = {"nsa": 64, "fa3": 1}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_nsa", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, and what the plugin would do")
    bench = commands.add_parser("bench", help="SGLang's own path and the plugin's, side by side")
    bench.add_argument("--backend", choices=BACKENDS, nargs="+", default=list(BACKENDS), help="kind")
    bench.add_argument("--steps", type=int, nargs="+", default=[3, 4, 8], help="N is one less")
    bench.add_argument("--bs", type=int, nargs="+", default=[1, 8, 32], help="requests")
    bench.add_argument("--context-len", type=int, default=16384)
    bench.add_argument("--page-size", type=int, help="tokens per page of keys; default: nsa 64, fa3 1")
    bench.add_argument("--decode", choices=DECODE, nargs="+", default=DECODE[:1], help="nsa's decode kernel")
    bench.add_argument("--json", action="store_true", help="JSON instead of the table")
    bench.add_argument("--out", help="a file for the JSON, beside the table")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ModuleNotFoundError:
        sys.exit("torch is not installed: the plugin works beside SGLang, which brings it")
    if options.command == "doctor":
        from .doctor import print_report

        return 0 if print_report() else 1
    from .bench import print_table, run_bench
    from .fields import UnsupportedError
    from .real_classes import Sizes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for kind in options.backend:
        for decode in options.decode if kind == "nsa" else DECODE[:1]:
            sizes = Sizes(
                context_len=options.context_len,
                pool=max(options.bs) + 1,
                page_size=options.page_size or PAGE_SIZE[kind],
                draft_tokens=max(options.steps) + 1,
                decode=decode,
            )
            try:
                found = run_bench(kind, options.steps, options.bs, sizes, device)
            except UnsupportedError as error:
                sys.exit(f"{kind}: {error}; see python -m sglang_nsa doctor")
            if not options.json:
                print(f"{kind}, {decode if kind == 'nsa' else 'chain drafts'}, page size {sizes.page_size}")
                print_table(found)
            case = {"backend": kind, "page_size": sizes.page_size}
            case |= {"decode": decode} if kind == "nsa" else {}
            rows += [case | row for row in found]
    if options.json:
        print(json.dumps(rows))
    if options.out:
        Path(options.out).write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
