#!/usr/bin/env bash
# Clients that nobody here wrote, unmodified, against a fresh server of models/tiny-nsa, each in the version of
# scripts/clients/requirements.txt. They live in an environment of their own, build/clients (some 7 GB: lm_eval
# needs torch), and SGLang's wheels are unpacked beside them. The table of results goes to the file that is
# named, or to stdout; the exit status says whether all of them passed.
#
#   scripts/check_clients.sh [docs/compatibility.md]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} # the server's; make setup makes it
work=${CLIENTS_DIR:-build/clients}
wheels=$work/wheels
mkdir -p "$wheels"

[ -x "$work/venv/bin/python" ] || "$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --requirement scripts/clients/requirements.txt
for version in 0.5.9 0.5.12; do
  if [ ! -d "$work/sglang-$version" ]; then
    "$work/venv/bin/python" -m pip download --quiet --no-deps --dest "$wheels" "sglang==$version"
    "$work/venv/bin/python" -m zipfile -e "$wheels/sglang-$version"-*.whl "$work/sglang-$version"
  fi
done
exec "$work/venv/bin/python" scripts/clients/check.py --server-python "$python" --work "$work" ${1:+--table "$1"}
