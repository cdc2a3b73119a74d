#!/usr/bin/env bash
# The CPU library's tests under AddressSanitizer: builds it into build/asan, then runs the tests (or the arguments).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
python=$(command -v "${PYTHON:-python3}")
flags="-fsanitize=address -fno-omit-frame-pointer -g"

cmake -S "$root" -B "$root/build/asan" -DPython_EXECUTABLE="$python" -DSGL_KERNEL_CUDA=OFF -DSGL_KERNEL_EMULATION=OFF \
  -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_MODULE_LINKER_FLAGS=-fsanitize=address >/dev/null
cmake --build "$root/build/asan"

if (($# == 0)); then
  set -- "$here"/test_{plans,replays,sglang_calls,fused_metadata_copy,nsa_metadata_generate,paged_mqa_schedule}.py \
    "$here"/test_validation_*.py
fi
# Leaks are not looked for: the interpreter does not free what it holds at its end.
export SGL_KERNEL_LIBRARY_DIR=$root/build/asan PYTHONPATH=$root/python${PYTHONPATH:+:$PYTHONPATH} PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:halt_on_error=1 OMP_NUM_THREADS=1
compiler=${CXX:-c++}
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so.6)" \
  "$python" -m pytest -q --capture=sys -p no:cacheprovider "$@"
