"""Starts released SGLang servers side by side on one machine, and stops them by their process ids.

Several of these checks can run at once, each on a GPU of its own: with PORT_BASE and OUT_DIR of
their own, and the bundles unpacked before (`gpu_check.py unpack`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BUNDLES = Path(os.environ.get("SGLANG_BUNDLES", ".plugin_gpu"))  # <release's folder>/launch.sh, and site/
FOLDERS = {"0.5.12": "real_sglang", "0.5.17": "real_sglang_0517"}
ARCHIVES = {"0.5.12": "v0512.tar.xz", "0.5.17": "delta.tar.xz"}
OUT = Path(os.environ.get("OUT_DIR", "plugin_gpu"))
SITE = BUNDLES / "site"  # the plugin's wheel, unpacked, its dist-info included
# One count for all groups of servers: two may be up at the same time. Below the ports that systems hand out.
PORTS = itertools.count(int(os.environ.get("PORT_BASE", "20000")), 10)
NCCL_PORT = 5  # above the server's
UNPACKED = {
    "0.5.12": ("/tmp/real_site/.unpacked.common", "/tmp/real_site/.unpacked.v0512"),
    "0.5.17": (
        "/tmp/real_site/.unpacked.common",
        "/tmp/real_site17/.unpacked",
        "/tmp/real_launch17/launch.sh",
    ),
}


@dataclass
class Server:
    """One server. `layout` None: without the plugin."""

    name: str
    release: str
    layout: str | None = "shared"
    steps: int = 4
    variant: str = "bf16"
    env: dict[str, str] = field(default_factory=dict)
    args: str = ""
    before: tuple[Path, ...] = ()  # of the import path, with distributions of their own
    port: int = 0
    pid: int | None = None
    launcher: subprocess.Popen | None = None

    @property
    def folder(self) -> Path:
        return OUT / self.name

    @property
    def log(self) -> Path:
        return self.folder / "server.main.log"

    def start(self, port: int) -> None:
        self.port = port
        # Many stand side by side: those that nobody asks should leave the cores to the others.
        args = f"--mem-fraction-static 0.7 --sleep-on-idle --nccl-port {port + NCCL_PORT} {self.args}"
        self.folder.mkdir(parents=True, exist_ok=True)
        env = os.environ | {
            "PORT": str(port), "STEPS": str(self.steps), "VARIANT": self.variant,
            "OUT": str(self.folder.resolve()),
            "KEEP": "1", "CHECKS": "0", "NO_FALLBACK": "1", "PROBE": "0", "CLIENT": "true", "TAIL": "5",
            "EXTRA_ARGS": args,
            "HEALTH_S": os.environ.get("HEALTH_S", "280"),
        }  # fmt: skip
        if self.layout is not None:
            path = ":".join(str(folder.resolve()) for folder in (*self.before, SITE))
            env |= {"EXTRA_PYTHONPATH": path, "SGLANG_NSA_PLUGIN_LAYOUT": self.layout}
            env |= {"SGLANG_NSA_PLUGIN_STRICT": "1"}
        launch = BUNDLES / FOLDERS[self.release] / "launch.sh"
        if self.release == "0.5.17":
            # What its own launch.sh generated when it was unpacked: only read from now on.
            launch = Path("/tmp/real_launch17/launch.sh")
            env["EXTRA_ARGS"] += " --disable-prefill-cuda-graph"
            for name in ("SGLANG_DSA", "SGLANG_NSA"):
                env[f"{name}_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD"] = "0"
        with open(self.folder / "launch.log", "w") as log:
            self.launcher = subprocess.Popen(
                ["bash", str(launch)],
                env=env | self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> bool:
        """Until it answers or its launcher gives up."""
        self.launcher.wait()
        text = (self.folder / "launch.log").read_text(errors="replace")
        found = re.search(r"left running, pid (\d+)", text)
        if found is not None:
            self.pid = int(found.group(1))
            with open(OUT / "pids.txt", "a") as file:  # for whoever cleans up after this process
                file.write(f"{self.pid}\n")
        return self.pid is not None

    def signal(self, number: int) -> None:
        """To its process group: setsid made the server the leader of its own."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def says(self, pattern: str = "sglang-nsa-plugin", last: int = 6) -> list[str]:
        """The last lines of its log that name the plugin, without their time stamps."""
        if not self.log.exists():
            return ["(no server log)"]
        lines = [
            line for line in self.log.read_text(errors="replace").splitlines() if re.search(pattern, line)
        ]
        return [re.sub(r"^\[[^]]*\]\s*", "", line)[:1200] for line in lines[-last:]]


def available() -> list[str]:
    """The releases whose bundle is here."""
    return [release for release, folder in FOLDERS.items() if (BUNDLES / folder / ARCHIVES[release]).exists()]


_unpacked: set[str] = set()
_unpacking = threading.Lock()


def unpack(releases: set[str]) -> None:
    """Once, before servers start side by side."""
    waiting = []
    with _unpacking:
        for release in sorted(releases - _unpacked):
            if all(Path(marker).exists() for marker in UNPACKED[release]):
                continue
            env = os.environ | {
                "ONLY": "imports",
                "CHECKS": "0",
                "OUT": "/tmp/plugin_gpu_unpack",
                "PROBE": "0",
            }
            command = ["bash", str(BUNDLES / FOLDERS[release] / "launch.sh")]
            with open(OUT / f"unpack_{release}.log", "w") as log:
                waiting.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
            _unpacked.add(release)
            while not Path("/tmp/real_site/.unpacked.common").exists() and waiting[-1].poll() is None:
                time.sleep(0.2)  # what both share is unpacked once
        for process in waiting:
            process.wait()


def stop(servers: list[Server]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for server in servers:
            server.signal(number)
        time.sleep(3 if servers and number == signal.SIGTERM else 0)
    for server in servers:
        server.pid = None


class Servers:
    """`with Servers([...]) as up:` starts all at once; `up` are those that answer."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers

    def __enter__(self) -> list[Server]:
        started = time.monotonic()
        unpack({server.release for server in self.servers})
        for server in self.servers:
            server.start(next(PORTS))
            time.sleep(1)
        up = []
        for server in self.servers:
            ok = server.wait()
            print(
                f"{server.name}: {'up' if ok else 'DID NOT START'} after {time.monotonic() - started:.0f} s"
            )
            if ok:
                up.append(server)
            else:
                print((server.folder / "launch.log").read_text(errors="replace")[-2500:])
                print("\n".join(server.says("Error|error|exception|SystemExit|sglang-nsa", 25)))
        return up

    def __exit__(self, *exc: object) -> None:
        stop(self.servers)


def python(
    release: str, arguments: list[str], limit: float, before: Sequence[Path] = (), env: Mapping[str, str] = {}
) -> str:
    """What a Python program says in a release's environment, also if it fails or takes too long."""
    unpack({release})
    overlay = ["/tmp/real_site17"] if release == "0.5.17" else []
    sites = [*before, SITE, *overlay, "/tmp/real_site"]
    env = os.environ | {
        "PYTHONPATH": ":".join(str(Path(site).resolve()) for site in sites),
        "TVM_FFI_CACHE_DIR": f"{(overlay or sites)[-1]}/_tvm_cache",
        "FLASHINFER_WORKSPACE_BASE": "/tmp/real_fi", "DG_JIT_CACHE_DIR": "/tmp/real_dg",
        "DG_JIT_CPP_STANDARD": "20", "TRITON_CACHE_DIR": "/tmp/real_triton", "FLASHINFER_USE_CUDA_NORM": "1",
        "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", **_cuda_paths(), **env,
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, env=env, stdout=said, stderr=complained, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = f"no end within {limit:.0f} s"
        said.seek(0)
        complained.seek(0)
        text = said.read()
        if status != 0:
            text += f"{complained.read()[-2500:]}\n(status: {status})\n"
    with open(OUT / "modules.log", "a") as log:
        log.write(f"== {release} {' '.join(map(str, before))} {' '.join(arguments)}\n{text}\n")
    return text


def _cuda_paths() -> dict[str, str]:
    """Where JIT compilers find CUDA: as launch.sh sets it."""
    found = subprocess.run(
        [sys.executable, "-c", "import nvidia; print(list(nvidia.__path__)[0])"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", "/usr/local/cuda-13.0"]
    home = next((h for h in homes if h and Path(h, "bin/nvcc").exists()), "/usr/local/cuda")
    libraries = [
        os.environ.get("LD_LIBRARY_PATH", ""),
        f"{found}/cu13/lib",
        f"{home}/lib64",
        "/tmp/real_site/_lib",
    ]
    return {
        "CUDA_HOME": home,
        "PATH": f"{home}/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(path for path in libraries if path),
        "CPLUS_INCLUDE_PATH": f"{found}/cu13/include",
    }
