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
from pathlib import Path

import load
import profiles
from servers import BUNDLES, OUT, Server, Servers, available, run_module, stop

STEADY_S = float(os.environ.get("STEADY_S", "20"))  # under load for each number of requests
RELEASES = available()
ALTERNATE = os.environ.get("ALTERNATE", "")  # release-steps
STARTED = time.monotonic()
LIMIT_S = float(os.environ.get("LIMIT_S", "590"))  # of the whole run
STAND_INS = Path(__file__).resolve().parent / "stand_ins"  # of what is imported and never called
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
            alone, together = same[: load.ALONE], same[load.ALONE :]
            print(
                f"{server.name}: as {first}: {sum(alone)} of {len(alone)} answers alone, {sum(together)} of"
                f" {len(together)} eight at a time; verify steps {accepted[:4]}"
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


def tokens_rest(deadline: float | None = None) -> None:
    """STEPS 2 and 8, fp8, flag 0, replicate, simulated acceptance: five servers at a time."""
    verify = {"SGLANG_NSA_VERIFY_METADATA": "1"}
    simulate = {"SGLANG_SIMULATE_ACC_LEN": "3"}
    for release in RELEASES:
        servers = [
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
        for some in (servers[:5], servers[5:]):
            if deadline is not None and time.monotonic() > deadline - 120:
                print("no time left for", ", ".join(server.name for server in some))
                continue
            compare_tokens(some)


def alternating() -> list[Server]:
    env = {"SGLANG_NSA_PLUGIN_ALTERNATE": "100"}
    return [
        Server(f"{release}-s{steps}-{layout}-alternate", release, layout, int(steps), env=env)
        for release, steps in (case.split("-") for case in ALTERNATE.split())
        if release in RELEASES
        for layout in ("shared", "in_graph")
    ]


def alternate() -> None:
    """SGLang's path and the plugin's by turns of 100 replays: host time of the call, time of a step."""
    with Servers(alternating()) as up:
        measure(up)


def measure(servers: list[Server]) -> None:
    """One server at a time; all are warm before the first is measured."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        list(pool.map(lambda server: _bounded(load.steady, 40, server.port, 8, 1, 100, 50), servers))
    for server in servers:
        for requests in (1, 8):
            tpot = _bounded(load.steady, STEADY_S + 15, server.port, requests, STEADY_S, 600, 200)
            said = "no answer in time" if tpot is None else f"{tpot:.2f} ms per output token over both paths"
            print(f"{server.name}: {requests} requests, {said}", flush=True)
            if tpot is None:
                break
        print("    " + "\n    ".join(server.says("plugin alternate", 1)), flush=True)


def _bounded(function: Callable, seconds: float, *arguments: object) -> object:
    """The result, or None if it takes longer: a server that hangs must not take the report with it."""
    result: list = []
    thread = threading.Thread(target=lambda: result.append(function(*arguments)), daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None


def profile(server: Server) -> None:
    """How busy the GPU is while eight requests decode: torch's profiler over some steps."""
    folder = (server.folder / "profile").resolve()
    folder.mkdir(exist_ok=True)
    runner = threading.Thread(target=load.steady, args=(server.port, 8, 4))
    runner.start()
    time.sleep(2)
    try:
        body = {"output_dir": str(folder), "num_steps": 20, "activities": ["CPU", "GPU"]}
        load.post(server.port, "/start_profile", body, 60)
        runner.join()
        time.sleep(4)
        for line in profiles.summary(folder):
            print("    " + line)
    except Exception as error:
        print(f"    no profile: {error!r}")
    runner.join()


def bench() -> None:
    """`python -m sglang_nsa bench` on the real classes of each release: fields, stale schedules, memory."""
    for release in RELEASES:
        print(f"-- {release}", flush=True)
        run_module(release, "bench --steps 3 4 8 --bs 1 8 32 --decode flashmla_sparse flashmla_kv", 100)


def other_releases(deadline: float | None = None) -> None:
    """`bench` on the real classes of releases that need another torch, as far as they import."""
    for archive in sorted(BUNDLES.glob("sources/*")):
        if deadline is None or time.monotonic() < deadline - 70:
            print(f"-- {archive.name}", flush=True)
            run_module("0.5.17", "bench --steps 4 8 --bs 8", 60, before=[STAND_INS, archive])


def soak(seconds: float = float(os.environ.get("SOAK_S", "485"))) -> None:
    """Verification on during mixed load; beside it what needs no quiet machine, while there is time."""
    env = {"SGLANG_NSA_VERIFY_METADATA": "1", "SGLANG_SIMULATE_ACC_LEN": "3"}
    layouts = {"0.5.12": "shared", "0.5.17": "in_graph"}
    servers = [Server(f"{release}-soak", release, layouts[release], env=env) for release in RELEASES]
    measured = alternating()
    with Servers([*servers, *measured]) as up:
        measure([server for server in up if server in measured])
        stop(measured)
        up = [server for server in up if server in servers]
        deadline = min(time.monotonic() + seconds, STARTED + LIMIT_S - 25)
        threads = [threading.Thread(target=_soak, args=(server, deadline)) for server in up]
        for thread in threads:
            thread.start()
        for part in (tokens_rest, other_releases):
            try:
                part(deadline)
            except Exception as error:
                print(f"{part.__name__}: {error!r}")
        for thread in threads:
            thread.join(max(0, deadline + 15 - time.monotonic()))
        for server in up:
            print("\n    ".join([server.name, *server.says("sglang-nsa|MetadataMismatch|Traceback", 6)]))


def _soak(server: Server, deadline: float) -> None:
    started = time.monotonic()
    counts = load.mixed(server.port, deadline - started)
    print(f"{server.name}: {time.monotonic() - started:.0f} s of mixed load, {counts}", flush=True)


def tensor_parallel() -> None:
    """Two GPUs: the same tokens, the plugin in every rank."""
    release = os.environ.get("TP_RELEASE", "0.5.12")
    extra = "--tp 2 --disable-custom-all-reduce"
    env = {"SGLANG_NSA_VERIFY_METADATA": "1"}
    compare_tokens(
        [
            Server(f"{release}-tp2-none", release, None, args=extra),
            Server(f"{release}-tp2-shared", release, "shared", args=extra, env=env),
        ]
    )


PARTS: dict[str, Callable[[], None]] = {
    "bench": bench,
    "other_releases": other_releases,
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
