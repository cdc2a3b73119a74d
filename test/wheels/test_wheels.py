"""`pip wheel .` and `pip wheel ./sgl-kernel`: installed with pip alone, they serve with the kernels.

The environment is fresh and knows nothing of the tree. The packages that the two depend on are links to those
that are installed already; ours are not among them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import Parser
from pathlib import Path

import httpx
import pytest
from server_fixture import ROOT, RunningServer, free_port, wait_gone, wait_ready

OURS = ("sglang", "sgl_kernel", "__editable__")
MODEL = ROOT / "models" / "tiny-nsa"
FLAGS = ("--device", "cpu", "--speculative-algorithm", "NEXTN", "--nsa-metadata-copy", "fused")


def run(python: str | Path, folder: Path, *arguments: str | Path) -> str:
    """What it prints. Nothing in its environment leads to the tree."""
    command = list(map(str, (python, *arguments)))
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def environment() -> dict[str, str]:
    kept = {"PATH", "HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS"}
    return {name: value for name, value in os.environ.items() if name in kept}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both wheels. The runtime's sources are copied: setuptools packs what an earlier build left over."""
    out, source = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "python", source / "python", ignore=leave_out)
    options = ("--no-deps", "--no-build-isolation", "-w", out)
    for package in (source, ROOT / "sgl-kernel"):
        run(sys.executable, out, "-m", "pip", "wheel", *options, package)
    return out


@pytest.fixture(scope="session")
def python(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment into which pip has installed the runtime's wheel by name."""
    folder = tmp_path_factory.mktemp("environment")
    dependencies = folder / "dependencies"
    dependencies.mkdir()
    for path in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        for entry in path.iterdir():
            if not entry.name.startswith(OURS):
                (dependencies / entry.name).symlink_to(entry)
    run(sys.executable, folder, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(python, folder, "-m", "pip", "uninstall", "-y", "setuptools")  # older than the one in `dependencies`
    site = run(python, folder, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "dependencies.pth").write_text(f"{dependencies}\n")
    run(python, folder, "-m", "pip", "install", "--no-index", "--find-links", wheels, "sglang-nsa[bench]")
    return python


def test_the_wheel_holds_the_package_and_says_what_it_needs(wheels: Path) -> None:
    with zipfile.ZipFile(next(wheels.glob("sglang_nsa-*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        requires = Parser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist")
    sources = (p for p in (ROOT / "python" / "sglang").rglob("*") if p.is_file())
    kinds = (".py", ".html", ".css", ".js")
    expected = {str(p.relative_to(ROOT / "python")) for p in sources if p.suffix in kinds}
    assert names == expected
    assert any(r.startswith("sgl-kernel-nsa") and "extra" not in r for r in requires)
    assert any(r.startswith("aiohttp") and 'extra == "bench"' in r for r in requires)


def test_everything_of_ours_comes_from_the_wheels(python: Path, tmp_path: Path) -> None:
    code = """
import json, sys
import sgl_kernel, sglang.bench_serving, sglang.launch_server
import sglang.srt.entrypoints.http_process, sglang.srt.managers.scheduler, sglang.srt.speculative.eagle_worker
assert sgl_kernel.available("cpu"), sgl_kernel.load_error("cpu")
files = {n: getattr(m, "__file__", None) for n, m in sys.modules.items()}
print(json.dumps({n: f for n, f in files.items() if f and n.partition(".")[0] in ("sglang", "sgl_kernel")}))
print(json.dumps([line.split()[-1] for line in open("/proc/self/maps") if "libsgl_kernel" in line]))
print(json.dumps(sys.path))
"""
    result = run(python, tmp_path, "-c", code)
    modules, libraries, path = map(json.loads, result.splitlines()[-3:])
    site = str(python.parents[1])
    assert len(modules) > 50 and libraries
    assert all(file.startswith(site) for file in [*modules.values(), *libraries])
    assert not any(entry.startswith(str(ROOT)) for entry in path)


@contextmanager
def launched(python: Path, folder: Path) -> Iterator[RunningServer]:
    port, log = free_port(), folder / "log"
    command = [python, "-m", "sglang.launch_server", "--model-path", MODEL, "--port", str(port), *FLAGS]
    env = environment() | {"SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, env=env, stdout=out, stderr=out)
    server = RunningServer(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_ready(server)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def test_it_serves_with_the_compiled_kernels(python: Path, tmp_path: Path) -> None:
    with launched(python, tmp_path) as server:
        scheduler = server.scheduler_pid
        maps = Path(f"/proc/{scheduler}/maps").read_text()
        library = {line.split()[-1] for line in maps.splitlines() if "libsgl_kernel_cpu" in line}
        assert len(library) == 1 and library.pop().startswith(str(python.parents[1]))
        params = {"temperature": 0, "max_new_tokens": 24}
        with server.client() as client:
            answer = client.post("/generate", json={"text": "import os\n", "sampling_params": params}).json()
        meta = answer["meta_info"]
        assert meta["completion_tokens"] == 24 and meta["spec_accept_length"] > 1
        metadata = server.internal_state()["nsa_metadata"]
        assert (metadata["copy"], metadata["fallbacks"]) == ("fused", 0) and metadata["replays"] > 0
        assert "page/page.js" in httpx.get(server.url).text
        port = server.url.rpartition(":")[2]
        flags = ["--port", port, "--num-prompts", "2", "--random-output-len", "4", "--disable-tqdm"]
        run(python, tmp_path, "-m", "sglang.bench_serving", *flags)
    wait_gone(scheduler)
