#!/usr/bin/env bash
# compute-sanitizer over the compact test list: memcheck, racecheck, initcheck, synccheck. Fails at the first error.
# Torch's caching allocator is off, so that every tensor has bounds of its own.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
if [[ ! -x $sanitizer ]]; then
  echo "compute-sanitizer was not found; set COMPUTE_SANITIZER" >&2
  exit 2
fi

export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck synccheck; do
  echo "== $tool"
  "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" "$here/sanitize_cases.py"
done
echo "memcheck, racecheck, initcheck and synccheck are clean"
