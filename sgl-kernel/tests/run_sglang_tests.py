"""Runs SGLang's own test file of the fused metadata copy against this library.

    python sgl-kernel/tests/run_sglang_tests.py PATH... [--device cpu|cuda]

PATH: a wheel of sglang (0.5.9 to 0.5.12), the file test_fused_metadata_copy.py itself, or a folder of these.
Changed are the lines that import and register, and with --device cpu the device. Every test has to pass, none
may be skipped.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

NAME = "test_fused_metadata_copy.py"
IN_WHEEL = f"sglang/jit_kernel/tests/{NAME}"
PACKAGE = Path(__file__).resolve().parent.parent / "python"

IMPORTS = (
    (r"\bfrom sglang\.jit_kernel\.fused_metadata_copy import\b", "from sgl_kernel import"),
    (r"(?m)^(from sglang\.test\.ci.*|register_\w+_ci\(.*)\n", ""),
)
CPU = (
    (r"\"cuda\"", '"cpu"'),
    (r"torch\.cuda\.is_available\(\)", "True"),
    (r"torch\.cuda\.synchronize\(\)", "None"),
)


def test_files(paths: list[Path]) -> Iterator[tuple[str, str]]:
    """(where it comes from, its text) of every test file in the paths."""
    for path in paths:
        if path.is_dir():
            yield from test_files(sorted(p for p in path.iterdir() if p.suffix == ".whl" or p.name == NAME))
        elif path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                yield path.name, wheel.read(IN_WHEEL).decode()
        else:
            yield str(path), path.read_text()


def adapted(text: str, device: str) -> str:
    for pattern, replacement in (*IMPORTS, *(CPU if device == "cpu" else ())):
        text = re.sub(pattern, replacement, text)
    left = re.search(r".*\bsglang\..*", text)
    if left:
        sys.exit(f"{NAME}: a line that would need SGLang itself: {left[0].strip()}")
    return text


def run(text: str) -> str:
    """Pytest's summary; exits if a test did not pass."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / NAME).write_text(text)
        (Path(folder) / "pytest.ini").write_text("[pytest]\n")  # no configuration from outside
        path = os.pathsep.join(filter(None, (str(PACKAGE), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", NAME]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    summary = done.stdout.strip().rpartition("\n")[2]
    if done.returncode != 0 or not re.fullmatch(r"\d+ passed(, \d+ warnings?)? in .*", summary):
        sys.exit(f"{done.stdout}{done.stderr}\nNOT all tests passed: {summary}")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    found = list(test_files(args.paths))
    if not found:
        sys.exit(f"no wheel of sglang and no {NAME} in {', '.join(map(str, args.paths))}")
    for origin, text in found:
        print(f"{origin} on {args.device}: {run(adapted(text, args.device))}", flush=True)


if __name__ == "__main__":
    main()
