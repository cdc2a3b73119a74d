#!/usr/bin/env bash
# Builds, tests and measures everything that needs a GPU, on a machine with a GPU and no network.
#
#   scripts/gpu_check.sh [OUTPUT_FOLDER]          default: docs/results/latest
#
# Uses the machine's own python3 (torch with CUDA, transformers, matplotlib). What else is needed (requirements:
# fastapi, uvicorn, pyzmq, msgspec, prometheus-client, pytest, hypothesis, httpx, psutil, aiohttp) may lie as wheels in
# the folder WHEELS (default .whl); COMMIT names the version where there is no .git. STEPS picks parts:
# build tests sglang-tests fuzz sanitize sanitize-libraries kernels metadata soak speculation paths study peers.
# sglang-tests reads wheels of SGLang, or its file test_fused_metadata_copy.py, in the folder SGLANG_TESTS (default
# .sglang); peers runs side.py of the folder PEERS (default .peers), which times SGLang's own methods beside ours.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT_DIR=${1:-docs/results/latest}
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl}
STEPS=${STEPS:-build tests sglang-tests fuzz sanitize sanitize-libraries kernels metadata soak speculation paths study peers}
"$PYTHON" -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU")' || exit 1
FUZZ_CASES=${FUZZ_CASES:-100000}
SOAK_REPLAYS=${SOAK_REPLAYS:-100000}
mkdir -p "$OUT_DIR"
failed=()

run() { # NAME COMMAND...: one part, its output in a file, its time and outcome in one line
  local name=$1 started=$SECONDS
  shift
  echo "== $name: $*"
  if "$@" >"$OUT_DIR/$name.log" 2>&1; then
    echo "   ok in $((SECONDS - started)) s: $(tail -n 1 "$OUT_DIR/$name.log")"
  else
    echo "   FAILED in $((SECONDS - started)) s"
    tail -n "${TAIL:-25}" "$OUT_DIR/$name.log"
    failed+=("$name")
  fi
}
wants() { [[ " $STEPS " == *" $1 "* ]]; }

if compgen -G "$WHEELS/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD/python:$PWD/sgl-kernel/python${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

"$PYTHON" - >"$OUT_DIR/machine.txt" <<'PY'
import datetime, os, platform, subprocess, torch
commit = os.environ.get("COMMIT") or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
print("date      ", datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
print("commit    ", (commit or "unknown (no .git here)") + (" with changes" if dirty else ""))
print("gpu       ", torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] // 2**30, "GiB")
print("torch     ", torch.__version__, " CUDA", torch.version.cuda)
print("python    ", platform.python_version())
try:
    import triton
    print("triton    ", triton.__version__)
except ImportError:
    print("triton     not installed")
PY
echo "command    scripts/gpu_check.sh $* (STEPS=$STEPS)" >>"$OUT_DIR/machine.txt"
cat "$OUT_DIR/machine.txt"

if wants build; then
  run configure cmake -S sgl-kernel -B sgl-kernel/build-gpu -DSGL_KERNEL_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="${ARCH:-90}" -DPython_EXECUTABLE="$(command -v "$PYTHON")"
  run build cmake --build sgl-kernel/build-gpu --parallel
fi
export SGL_KERNEL_LIBRARY_DIR=${SGL_KERNEL_LIBRARY_DIR:-$PWD/sgl-kernel/build-gpu}

wants tests && run tests "$PYTHON" -m pytest -m gpu -p no:cacheprovider --durations=15 ${TESTS:-}
if wants sglang-tests; then
  if [[ -e ${SGLANG_TESTS:-.sglang} ]]; then
    run sglang-tests "$PYTHON" sgl-kernel/tests/run_sglang_tests.py "${SGLANG_TESTS:-.sglang}" --device cuda
  else
    echo "== sglang-tests: left out, there is no ${SGLANG_TESTS:-.sglang}"
  fi
fi
wants fuzz && run fuzz "$PYTHON" sgl-kernel/tests/fuzz_metadata.py --device cuda --cases "$FUZZ_CASES" --seconds "${FUZZ_SECONDS:-240}" --jobs "${JOBS:-8}"
wants sanitize && run sanitize bash sgl-kernel/tests/sanitize.sh
if wants sanitize-libraries; then
  # Padding keeps neighbours apart: a read past an allocation is an error whatever lies there.
  sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
  run sanitize-libraries "$sanitizer" --tool memcheck --padding 1048576 --report-api-errors no --error-exitcode 1 \
    --target-processes application-only "$PYTHON" -m pytest -m gpu -p no:cacheprovider test/srt/test_attention_gpu_libraries.py
fi
wants kernels && run kernels "$PYTHON" sgl-kernel/benchmark/bench_fused_metadata_copy.py --json "$OUT_DIR/kernels.json"
wants metadata && run metadata "$PYTHON" -m sglang.bench_metadata --device cuda --grid "${GRID:-h200}" --json "$OUT_DIR/metadata.json" --plot "$OUT_DIR"
wants soak && run soak "$PYTHON" -m sglang.bench_metadata --soak "$SOAK_REPLAYS" --device cuda
wants speculation && run speculation "$PYTHON" benchmark/speculation.py --device cuda --num-prompts 64 --output-len 128 \
  --concurrency 1 32 --disable-tqdm --json "$OUT_DIR/speculation.json"
if wants paths; then
  run paths-tiny "$PYTHON" benchmark/compare_paths.py --device cuda --cases 256x1 256x8 2048x32 --out "$OUT_DIR"
  run paths-v32 "$PYTHON" benchmark/compare_paths.py --device cuda --model v32 --cases 1024x1 1024x8 8192x8 --out "$OUT_DIR"
fi
wants study && run study "$PYTHON" benchmark/study.py --device cuda --out "$OUT_DIR"
if wants peers; then
  # The project's methods beside SGLang's own, in one process: side.py of a folder that is no part of the project.
  if [[ -e ${PEERS:-.peers}/side.py ]]; then
    PROJECT=$PWD run peers "$PYTHON" "${PEERS:-.peers}/side.py"
  else
    echo "== peers: left out, there is no ${PEERS:-.peers}/side.py"
  fi
fi

if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all parts passed: $STEPS"
