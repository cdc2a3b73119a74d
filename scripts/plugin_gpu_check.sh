#!/usr/bin/env bash
# Checks and measures the plugin inside released SGLang servers, on a machine with a GPU and no network.
#
#   OUT_DIR=folder scripts/plugin_gpu_check.sh PART...        parts: plugin/tests/gpu/gpu_check.py
#
# SGLANG_BUNDLES (default .plugin_gpu) holds a folder for each release, whose launch.sh starts that server, and site/,
# the plugin's wheel unpacked (built with SGL_KERNEL_CUDA=ON).
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT_DIR=${OUT_DIR:-plugin_gpu} SGLANG_BUNDLES=${SGLANG_BUNDLES:-.plugin_gpu} PYTHONUNBUFFERED=1
mkdir -p "$OUT_DIR"
"${PYTHON:-python3}" plugin/tests/gpu/gpu_check.py "$@" 2>&1 | tee -a "$OUT_DIR/plugin_gpu_check.txt"
