"""What needs a GPU and released SGLang servers: `python gpu_check.py PART...`; see `PARTS`.

Servers of one part start side by side, so a part costs one start. Only one is under load where time counts.
Parts that need a GPU of their own run as processes of their own: see servers.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import load
import profiles
from servers import BUNDLES, OUT, Server, Servers, available, python, unpack
from soak import soak

STEADY_S = float(os.environ.get("STEADY_S", "4"))  # under load for each number of requests
SOAK_S = float(os.environ.get("SOAK_S", "485"))
LIMIT_S = float(os.environ.get("LIMIT_S", "590"))  # of the whole run: nothing is begun that cannot end
STARTED = time.monotonic()
START_S = float(os.environ.get("START_S", "75"))  # of a group of servers, until they answer
RELEASES = [r for r in available() if r in os.environ.get("RELEASES", r).split()]
Ask = Callable[[int, int], list[dict[str, Any]]]  # (port, tokens an answer) -> answers
VERIFY = {"SGLANG_NSA_VERIFY_METADATA": "1"}
SIMULATE = {"SGLANG_SIMULATE_ACC_LEN": "3"}
FLAG_OFF = {
    "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA": "0",
    "SGLANG_DSA_ENABLE_MTP_PRECOMPUTE_METADATA": "0",
}


def left() -> float:
    """Seconds until the limit, with some to stop servers."""
    return STARTED + LIMIT_S - time.monotonic() - 12


# ---- tokens


def compare_tokens(servers: list[Server], ask: Ask = load.greedy, tokens: int = 96) -> None:
    """The answers of each server against those of the first of its kind (release, steps, variant)."""
    if left() < START_S + 30:
        print("no time left for", ", ".join(server.name for server in servers), flush=True)
        return
    reference: dict[tuple, tuple[str, list]] = {}
    with Servers(servers) as up:
        running = [load.Background(ask, server.port, tokens) for server in up]
        for server, result in zip(up, running, strict=True):
            answers = result.wait(left())
            if answers is None:
                print(f"{server.name}: no answers")
                print("\n".join(server.says("Error|error|Exception|SystemExit|sglang-nsa", 30)), flush=True)
                continue
            (OUT / f"tokens_{server.name}.json").write_text(json.dumps(answers))
            simulated = "SGLANG_SIMULATE_ACC_LEN" in server.env
            kind = (server.release, server.steps, server.variant, server.args, simulated)
            first, expected = reference.setdefault(kind, (server.name, answers))
            print_comparison(server, first, expected, answers)


def print_comparison(server: Server, first: str, expected: list[dict], answers: list[dict]) -> None:
    parts = []
    for sent in dict.fromkeys(answer["sent"] for answer in answers):
        pairs = [(a, b) for a, b in zip(expected, answers, strict=True) if b["sent"] == sent]
        same = sum(a["tokens"] == b["tokens"] for a, b in pairs)
        steps = sum(a["verified"] == b["verified"] for a, b in pairs)
        parts.append(
            f"{same} of {len(pairs)} answers {sent}, {steps} in as many steps"
            f" ({sum(b['verified'] or 0 for _, b in pairs)} in all)"
        )
    print(f"{server.name}: as {first}: {'; '.join(parts)}", flush=True)
    for line in server.says(last=4 if server.layout else 1):
        print("    " + line, flush=True)


def tokens_first() -> None:
    """STEPS 4, bf16: without the plugin, and each layout; verification on once."""
    compare_tokens(
        [
            Server(f"{release}-{layout or 'none'}{suffix}", release, layout, env=env)
            for release in RELEASES
            for layout, suffix, env in (
                (None, "", {}),
                ("shared", "", {}),
                ("shared", "-verify", VERIFY),
                ("in_graph", "-verify", VERIFY),
            )
        ]
    )


# STEPS, variant, simulated acceptance, and the servers: layouts; "flag0": SGLang's own flag.
# Acceptance that is simulated answers with one token only: there it is the verification that says something.
TOKEN_GROUPS = (
    (
        (8, "fp8", False, ("none", "shared-verify", "in_graph-verify", "replicate")),
        (4, "bf16", True, ("none", "replicate-verify", "shared", "in_graph-verify", "flag0")),
    ),
    (
        (2, "fp8", False, ("none", "shared", "in_graph-verify", "flag0")),
        (8, "bf16", False, ("none", "shared-verify", "replicate-verify", "in_graph")),
    ),
    (
        (4, "fp8", False, ("none", "replicate-verify", "shared", "flag0")),
        (2, "bf16", False, ("none", "replicate-verify", "in_graph")),
        (8, "bf16", True, ("none", "shared-verify")),
    ),
)


def token_server(release: str, steps: int, variant: str, simulated: bool, kind: str) -> Server:
    layout = {"none": None, "none-again": None, "flag0": "shared"}.get(kind, kind.removesuffix("-verify"))
    env = (SIMULATE if simulated else {}) | (VERIFY if "verify" in kind else {})
    env |= FLAG_OFF if kind == "flag0" else {}
    name = f"{release}-s{steps}-{variant}{'-simulated' if simulated else ''}-{kind}"
    return Server(name, release, layout, steps, variant, env)


def tokens_rest() -> None:
    """STEPS 2, 4 and 8, bf16 and fp8, flag 0, each layout, simulated acceptance: a group at a time."""
    chosen = os.environ.get("TOKEN_GROUPS", "0 1 2").split()
    for group in (TOKEN_GROUPS[int(index)] for index in chosen):
        for release in RELEASES:
            compare_tokens([token_server(release, *case[:3], kind) for case in group for kind in case[3]])


ACCEPTED = (
    (4, "bf16", ("none", "none-again", "shared-verify", "in_graph-verify", "replicate-verify")),
    (8, "bf16", ("none", "shared", "in_graph")),
    (4, "fp8", ("none", "shared-verify", "replicate-verify")),
)


def tokens_accepted() -> None:
    """Weights with which tokens and accepted drafts depend on attention; batches that do not depend on the
    clock: then all answers, and the numbers of verify steps, are equal bit for bit."""
    model = accepted_model()
    for release in RELEASES:
        servers = [
            token_server(release, steps, variant, False, kind)
            for steps, variant, kinds in ACCEPTED
            for kind in kinds
        ]
        for server in servers:
            server.name += "-accepted"
            server.args = model
            server.env |= load.COLOCATED
        compare_tokens(servers, load.batched)


def accepted_model() -> str:
    """Writes the checkpoint; the arguments of a server of it."""
    model = OUT.resolve() / "accepted_model"
    script, config = Path(__file__).with_name("accepted_model.py"), BUNDLES / "real_sglang/model"
    print(python("0.5.12", [str(script), str(config), str(model)], 100), flush=True)
    # No prefix cache: what is computed does not depend on what came before.
    return f"--model-path {model} --load-format auto --disable-radix-cache"


def tensor_parallel() -> None:
    """Two GPUs: the same tokens, drafts accepted, the plugin in every rank."""
    args = accepted_model() + " --tp 2 --disable-custom-all-reduce"
    args += " --enforce-disable-flashinfer-allreduce-fusion"  # it may use NVLink multicast
    for release in RELEASES:
        servers = [
            Server(f"{release}-tp2-{layout or 'none'}", release, layout, args=args, env=env | load.COLOCATED)
            for layout, env in ((None, {}), ("shared", VERIFY))
        ]
        compare_tokens(servers, load.batched)


# ---- time


def deep_gemm_only() -> Path:
    """A plugin of SGLang's that makes ours call DeepGEMM's own schedule: a peer to measure."""
    folder = OUT / "deep_gemm_only"
    information = folder / "deep_gemm_only-0.1.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: deep-gemm-only\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\ndeep_gemm_only = deep_gemm_only:register\n"
    )
    (folder / "deep_gemm_only.py").write_text(
        "def register():\n    from sglang_nsa import derived\n\n"
        "    derived._schedules_by_kernel = lambda *_: None\n"
    )
    return folder


def alternating() -> list[Server]:
    """ALTERNATE: cases release-steps-layout, or -deepgemm for `shared` with DeepGEMM's own schedule."""
    servers = []
    for case in os.environ.get("ALTERNATE", "").split():
        release, steps, layout = case.split("-")
        before = (deep_gemm_only(),) if layout == "deepgemm" else ()
        env = {"SGLANG_NSA_PLUGIN_ALTERNATE": "100"}
        layout = "shared" if before else layout
        servers.append(Server(f"{case}-alternate", release, layout, int(steps), env=env, before=before))
    return [server for server in servers if server.release in RELEASES]


def alternate() -> None:
    """SGLang's path and the plugin's by turns of 100 replays: host time of the call, time of a step."""
    with Servers(alternating()) as up:
        warming = [load.Background(load.steady, server.port, 8, 1, 100, 50) for server in up]
        for server, result in zip(up, warming, strict=True):
            if result.wait(40) is None:
                print(f"{server.name}: not warm after 40 s", flush=True)
        for server in up:
            measure(server)
        for server in up:
            if server.release in os.environ.get("PROFILED", "").split() and left() > 40:
                profiles.profile(server, 8, 3, 5)


def measure(server: Server) -> None:
    for requests in (1, 8):
        if left() < STEADY_S + 15:
            print(f"{server.name}: no time left for {requests} requests", flush=True)
            return
        tpot = load.Background(load.steady, server.port, requests, STEADY_S, 600, 200).wait(STEADY_S + 15)
        said = "no answer in time" if tpot is None else f"{tpot:.2f} ms per output token over both paths"
        print(f"{server.name}: {requests} requests, {said}", flush=True)
        if tpot is None:
            print("    " + "\n    ".join(server.says("Error|error|Traceback", 5)), flush=True)
            return
    print("    " + "\n    ".join(server.says("plugin alternate", 1)), flush=True)


def bench() -> None:
    """`python -m sglang_nsa bench` on the real classes of each release: fields, stale schedules, memory."""
    for release in RELEASES:
        for decode in ("flashmla_sparse", "flashmla_kv"):
            command = f"-m sglang_nsa bench --backend nsa --steps 3 4 8 --bs 1 8 32 --decode {decode}"
            print(f"-- {release} {decode}", flush=True)
            print(python(release, command.split(), min(left(), 100)), flush=True)


def fa3() -> None:
    """FlashAttention's draft backends on each release's real classes: the tests' comparisons, then times."""
    tests = Path(__file__).resolve().parents[1]
    options = ["-q", "-c", os.devnull, "--rootdir", str(tests), "-p", "no:cacheprovider", "-W", "ignore"]
    for release in RELEASES:
        print(f"-- {release}", flush=True)
        print(python(release, ["-m", "sglang_nsa", "doctor"], min(left(), 60)), flush=True)
        command = ["-m", "pytest", *options, "--tb", "short", "--maxfail", "4", str(tests / "test_fa3.py")]
        print(python(release, command, min(left(), 150), env={"PLUGIN_TEST_DEVICE": "cuda"}), flush=True)
        for page_size in (1, 64):
            command = f"-m sglang_nsa bench --backend fa3 --steps 3 4 6 8 --bs 1 8 64 --page-size {page_size}"
            out = ["--out", str(OUT.resolve() / f"fa3_{release}_page{page_size}.json")]
            print(python(release, [*command.split(), *out], min(left(), 120)), flush=True)


def fa3_servers() -> None:
    """A dense model that drafts for itself, on FlashAttention's backends over a stand-in of its kernel."""
    folder = Path(__file__).resolve().parent
    model, stand_in = OUT.resolve() / "dense_model", folder / "fa3_stand_in"
    config = BUNDLES / "real_sglang/model"
    print(python("0.5.12", [str(folder / "dense_model.py"), str(config), str(model)], 60), flush=True)
    args = f"--model-path {model} --speculative-draft-model-path {model} --load-format auto --page-size 1"
    args += " --speculative-algorithm STANDALONE --attention-backend fa3 --skip-server-warmup"
    own = {"EXTRA_PYTHONPATH": str(stand_in), "SGLANG_USE_SGL_FA3_KERNEL": "1"}
    kinds = (
        ("none", None, own),
        ("shared-verify", "shared", VERIFY),
        ("in_graph-verify", "in_graph", VERIFY),
        ("shared-alternate", "shared", {"SGLANG_NSA_PLUGIN_ALTERNATE": "100"}),
    )
    for release in os.environ.get("FA3_RELEASES", " ".join(RELEASES)).split():
        compare_tokens(
            [
                Server(f"{release}-fa3-{name}", release, layout, 6, env=env, args=args, before=(stand_in,))
                for name, layout, env in kinds
                if name in os.environ.get("FA3_KINDS", name).split()
            ],
            tokens=480,
        )


# ---- classes of releases that need another torch


def other_releases() -> None:
    """The tests' comparisons on the GPU: the classes of each release in sources/, as far as it imports."""
    sources = Path(os.environ.get("SOURCES", BUNDLES / "sources"))
    folders = sorted(path for path in sources.glob("*") if path.is_dir())
    tests = Path(__file__).resolve().parents[1]
    arguments = [str(tests / "gpu/other_release.py")]
    with ThreadPoolExecutor(len(folders) or 1) as pool:
        running = {
            folder.name: pool.submit(
                python, "0.5.17", arguments, min(left(), 260), [tests / "gpu", tests, folder],
                {"TVM_FFI_CACHE_DIR": f"/tmp/plugin_gpu_jit/{folder.name}"},
            )
            for folder in folders
        }  # fmt: skip
        for name, result in running.items():
            print(f"-- {name}\n{result.result()}", flush=True)


def soaking() -> None:
    """Mixed load with verification on."""
    layouts = {"0.5.12": "shared", "0.5.17": "in_graph"}
    servers = [
        Server(f"{release}-soak", release, layouts[release], env=VERIFY | SIMULATE) for release in RELEASES
    ]
    with Servers(servers) as up:
        soak(up, min(SOAK_S, left() - 8))


PARTS: dict[str, Callable[[], None]] = {
    "unpack": lambda: unpack(set(RELEASES)),
    "bench": bench,
    "fa3": fa3,
    "fa3_servers": fa3_servers,
    "other_releases": other_releases,
    "tokens_first": tokens_first,
    "tokens_rest": tokens_rest,
    "tokens_accepted": tokens_accepted,
    "alternate": alternate,
    "soak": soaking,
    "tp": tensor_parallel,
}


def main() -> None:
    names = sys.argv[1:] or ["tokens_first"]
    if unknown := sorted(set(names) - PARTS.keys()):
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    OUT.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in names:
        started = time.monotonic()
        print(f"== {name}", flush=True)
        try:
            PARTS[name]()
        except Exception as error:
            failed = True
            print(f"{name}: {error!r}", flush=True)
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
    os._exit(failed)  # threads that wait for a server that hangs are not waited for


if __name__ == "__main__":
    main()
