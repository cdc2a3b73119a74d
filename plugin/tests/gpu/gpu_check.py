"""What needs a GPU and released SGLang servers: `python gpu_check.py PART...`; see `PARTS`.

Servers of one part start side by side, so a part costs one start. Only one is under load where time counts.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import load
from servers import OUT, Server, Servers, available

STEADY_S = float(os.environ.get("STEADY_S", "20"))  # under load for each number of requests
RELEASES = available()
FLAG_OFF = {
    "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA": "0",
    "SGLANG_DSA_ENABLE_MTP_PRECOMPUTE_METADATA": "0",
}


def compare_tokens(servers: list[Server]) -> None:
    """The answers of each server against those of the first of its kind (release, steps, variant)."""
    answers: dict[str, list] = {}
    reference: dict[tuple, str] = {}
    with Servers(servers) as up, ThreadPoolExecutor(len(servers)) as pool:
        futures = [pool.submit(load.greedy, server.port) for server in up]
        for server, future in zip(up, futures, strict=True):
            try:
                answers[server.name] = future.result()
            except Exception as error:
                print(f"{server.name}: no answers: {error!r}")
                print("\n".join(server.says("Error|error|Exception|SystemExit|sglang-nsa", 30)))
                continue
            simulated = "SGLANG_SIMULATE_ACC_LEN" in server.env  # then tokens depend on the order of requests
            kind = (server.release, server.steps, server.variant, server.args, simulated)
            first = reference.setdefault(kind, server.name)
            same = [
                a["tokens"] == b["tokens"] for a, b in zip(answers[first], answers[server.name], strict=True)
            ]
            accepted = [a["verified"] for a in answers[server.name]]
            print(
                f"{server.name}: {sum(same)} of {len(same)} answers as {first}; verify steps {accepted[:4]}"
            )
            for line in server.says(last=4 if server.layout else 1):
                print("    " + line)
    (OUT / f"tokens_{int(time.time())}.json").write_text(json.dumps(answers))


def tokens_first() -> None:
    """Both releases, STEPS 4, bf16: without the plugin, and each layout; verification on once."""
    compare_tokens(
        [
            Server(f"{release}-{layout or 'none'}{suffix}", release, layout, env=env)
            for release in RELEASES
            for layout, suffix, env in (
                (None, "", {}),
                ("shared", "", {}),
                ("shared", "-verify", {"SGLANG_NSA_VERIFY_METADATA": "1"}),
                ("in_graph", "-verify", {"SGLANG_NSA_VERIFY_METADATA": "1"}),
            )
        ]
    )


def tokens_rest() -> None:
    """STEPS 2 and 8, fp8, flag 0, replicate, simulated acceptance."""
    verify = {"SGLANG_NSA_VERIFY_METADATA": "1"}
    simulate = {"SGLANG_SIMULATE_ACC_LEN": "3"}
    for release in RELEASES:
        compare_tokens(
            [
                Server(f"{release}-s8-fp8-none", release, None, 8, "fp8"),
                Server(f"{release}-s8-fp8-shared", release, "shared", 8, "fp8", env=verify),
                Server(f"{release}-s8-fp8-in_graph", release, "in_graph", 8, "fp8", env=verify),
                Server(f"{release}-s2-none", release, None, 2),
                Server(f"{release}-s2-shared", release, "shared", 2, env=verify),
                Server(f"{release}-s4-none-simulated", release, None, 4, env=simulate),
                Server(f"{release}-s4-replicate-simulated", release, "replicate", 4, env=verify | simulate),
                Server(f"{release}-s4-none", release, None, 4),
                Server(f"{release}-s4-flag0", release, "shared", 4, env=FLAG_OFF),
            ]
        )


def alternate() -> None:
    """SGLang's path and the plugin's by turns of 100 replays: host time of the call, time of a step."""
    env = {"SGLANG_NSA_PLUGIN_ALTERNATE": "100"}
    servers = [
        Server(f"{release}-s{steps}-{layout}-alternate", release, layout, steps, env=env)
        for release in RELEASES
        for steps in (4, 8)
        for layout in ("shared", "in_graph")
    ]
    with Servers(servers) as up:
        for server in up:
            for requests in (1, 8):
                tpot = load.steady(server.port, requests, STEADY_S)
                print(f"{server.name}: {requests} requests, {tpot:.2f} ms per output token over both paths")
            print("    " + "\n    ".join(server.says("plugin alternate", 1)), flush=True)


def soak(seconds: float = float(os.environ.get("SOAK_S", "485"))) -> None:
    """Verification on during mixed load."""
    env = {"SGLANG_NSA_VERIFY_METADATA": "1", "SGLANG_SIMULATE_ACC_LEN": "3"}
    servers = [Server(f"{release}-soak", release, "shared", env=env) for release in RELEASES]
    with Servers(servers) as up:

        def run(server: Server) -> None:
            started = time.monotonic()
            counts = load.mixed(server.port, seconds)
            took = time.monotonic() - started
            print(f"{server.name}: {took:.0f} s of mixed load, {counts}", flush=True)

        threads = [threading.Thread(target=run, args=(server,)) for server in up]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for server in up:
            print("\n    ".join([server.name, *server.says("sglang-nsa|MetadataMismatch|Traceback", 6)]))


def tensor_parallel() -> None:
    """Two GPUs: the same tokens, the plugin in every rank."""
    extra = "--tp 2 --disable-custom-all-reduce"
    compare_tokens(
        [
            Server(f"{release}-tp2-{layout or 'none'}", release, layout, args=extra)
            for release in RELEASES
            for layout in (None, "shared")
        ]
    )


PARTS: dict[str, Callable[[], None]] = {
    "tokens_first": tokens_first,
    "tokens_rest": tokens_rest,
    "alternate": alternate,
    "soak": soak,
    "tp": tensor_parallel,
}


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or ["tokens_first"]:
        started = time.monotonic()
        print(f"== {name}", flush=True)
        PARTS[name]()
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
