"""Runs these tests beside released SGLangs: `python plugin/tests/run.py RELEASE... [-- PYTEST ARGUMENTS]`.

SGLang's distribution and ours are both imported as `sglang`, so each release gets folders of its own. Torch
and what else the project's environment has is taken from there; only what is imported beyond is downloaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-plugin"
NONE_CHOSEN = 5  # pytest's status where arguments leave no test
# What SGLang imports at the import of its attention backends, beside what the project itself depends on.
IMPORTED = """
apache-tvm-ffi charset-normalizer compressed-tensors dill einops gguf idna loguru nvidia-ml-py orjson
partial-json-parser pybase64 python-multipart requests setproctitle torchao triton urllib3 xgrammar
"""
ALL_RELEASES = """
0.5.11 0.5.12 0.5.12.post1 0.5.13 0.5.14 0.5.15 0.5.15.post1 0.5.16 0.5.17 0.5.18 0.5.19 0.5.20 0.5.21 0.5.22
0.5.23
"""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"], check=True)


def once(folder: Path, *requirements: str) -> Path:
    """A folder with these distributions, installed if it is not there yet."""
    if not (folder / ".ready").exists():
        print(f"== {folder.name}: {' '.join(requirements)}", flush=True)
        pip("install", "--upgrade", "--no-compile", "--target", str(folder), *requirements)
        (folder / ".ready").touch()
    return folder


def set_up(release: str) -> list[Path]:
    """The folders of a release, in the order of the import path."""
    sglang = once(FOLDER / f"sglang-{release}", f"sglang=={release}")
    folders = [FOLDER / "plugin", sglang, once(FOLDER / "imported", *IMPORTED.split())]
    (pin,) = requirements(sglang, "sglang", r"transformers==")
    version = pin.partition("==")[2]
    if version != metadata.version("transformers"):
        transformers = once(FOLDER / f"transformers-{version}", pin)
        needs = requirements(transformers, "transformers", r"(tokenizers|huggingface[-_]hub)\b")
        folders.insert(1, once(FOLDER / f"transformers-{version}-needs", *needs))
        folders.insert(1, transformers)
    return folders


def requirements(folder: Path, name: str, pattern: str) -> list[str]:
    """What the distribution `name` in a folder requires without extras, as far as it matches."""
    (distribution,) = metadata.distributions(name=name, path=[str(folder)])
    found = [r for r in distribution.requires or () if "extra ==" not in r and re.match(pattern, r)]
    return [r.partition(";")[0].strip() for r in dict.fromkeys(found)]


def install_plugin() -> None:
    """The wheel as users get it, its CPU library included."""
    wheels = FOLDER / "wheel"
    subprocess.run(["rm", "-rf", str(wheels), str(FOLDER / "plugin")], check=True)
    os.environ["SGL_KERNEL_CUDA"] = "OFF"
    pip("wheel", "--no-build-isolation", "-w", str(wheels), str(ROOT / "plugin"))
    (wheel,) = wheels.glob("sglang_nsa_plugin-*.whl")
    zipfile.ZipFile(wheel).extractall(FOLDER / "plugin")


def python() -> Path:
    """An interpreter with the packages of the project's environment, but without its editable `sglang`."""
    environment = FOLDER / "env"
    if not (environment / "bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        (site,) = environment.glob("lib/python3*/site-packages")
        packages = Path(metadata.distribution("torch").locate_file(""))
        # A path in a .pth file is searched, but its own .pth files, the editable installs, are not read.
        (site / "project.pth").write_text(f"{packages}\n")
    return environment / "bin/python"


def start(name: str, release: str, tests: list[Path], arguments: list[str]) -> subprocess.Popen:
    folder = ROOT / "plugin/tests"
    path = [*set_up(release), folder]
    env = os.environ | {
        "PYTHONPATH": ":".join(map(str, path)),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [
        str(python()), "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder),
        "-p", "no:cacheprovider", "-W", "ignore", *map(str, tests), *arguments,
    ]  # fmt: skip
    log = open(FOLDER / f"{name}.log", "w")  # noqa: SIM115
    return subprocess.Popen(command, env=env, cwd=FOLDER, stdout=log, stderr=subprocess.STDOUT)


def runs(releases: list[str]) -> Iterator[dict[str, tuple[str, list[Path]]]]:
    """What runs side by side: by name, a release and its tests. mini-sglang's are not beside SGLang: once."""
    tests = set((ROOT / "plugin/tests").glob("test_*.py"))
    minisgl = {path for path in tests if path.name.startswith("test_minisgl")}
    for i in range(0, len(releases), 2):
        side_by_side = {release: (release, sorted(tests - minisgl)) for release in releases[i : i + 2]}
        if i == 0:
            side_by_side["mini-sglang"] = (releases[0], sorted(minisgl))
        yield side_by_side


def main() -> int:
    releases, _, rest = " ".join(sys.argv[1:]).partition("--")
    wanted = ALL_RELEASES.split() if releases.split() == ["all"] else releases.split()
    FOLDER.mkdir(exist_ok=True)
    with ThreadPoolExecutor(1) as pool:  # the compiler works while the first releases are fetched
        installing = pool.submit(install_plugin)
        for release in wanted[:2]:
            set_up(release)
        installing.result()
    failed = []
    for side_by_side in runs(wanted):
        started = time.monotonic()
        running = {name: start(name, *what, rest.split()) for name, what in side_by_side.items()}
        for name, process in running.items():
            status = process.wait()
            lines = (FOLDER / f"{name}.log").read_text(errors="replace").splitlines()
            took = f"{time.monotonic() - started:.0f} s"
            print(f"== {name}, {took}: {lines[-1] if lines else ''}", flush=True)
            if status and not (status == NONE_CHOSEN and rest):
                failed.append(name)
                print("\n".join(lines[-60:]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
